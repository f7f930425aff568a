"""One training step: a batch in, per-sample losses out. The same for every family and method."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from library.runtime import seeds

if TYPE_CHECKING:
    from library.families.base import Family
    from library.objectives.objective import Objective
    from library.types import Batch, Denoise, Draw, Models, NoiseDraw, TextCond


@dataclass
class StepParts:
    """The inputs of a step: `denoise` computes the prediction, `grad_text` says whether text encoders get gradients.

    `draw` gives noisy latents and targets where there are no images; None: noise on the images' latents.
    """

    family: Family
    models: Models
    denoise: Denoise
    objective: Objective
    grad_text: bool
    draw: Draw | None = None
    streams: seeds.Streams = field(default_factory=seeds.Streams)


def batch_latents(parts: StepParts, batch: Batch, rng: torch.Generator) -> Tensor:
    """The batch's clean latents as the denoiser sees them, float32, (B, C, h, w).

    Encoding leaves `rng` alone, so that noise and times are the same with cached latents and without.
    """
    if batch.latents is not None:
        latents = batch.latents
    else:
        own = parts.streams.at(rng.device, rng.initial_seed(), "latents")
        with torch.no_grad():
            latents = parts.family.latents.encode(parts.models, batch.pixels, generator=own)
    return parts.family.latents.scale(latents.float())


def with_inpainting(parts: StepParts, batch: Batch, rng: torch.Generator) -> Batch:
    """The batch with what a model for inpainting reads of its images, see `Batch.inpainting`; others as they are."""
    if batch.inpainting_masks is None:
        return batch
    own = parts.streams.at(rng.device, rng.initial_seed(), "masked image")
    with torch.no_grad():
        seen = parts.family.latents.inpainting_input(parts.models, batch.pixels, batch.inpainting_masks, own)
    return replace(batch, inpainting=seen)


def batch_text(parts: StepParts, batch: Batch) -> TextCond:
    if batch.text is not None and not parts.models.text_encoders:  # those whose outputs are cached have gone
        return batch.text
    with torch.set_grad_enabled(parts.grad_text and torch.is_grad_enabled()):
        return parts.family.text.encode(parts.models, batch.captions, cached=batch.text)


class StepResult(NamedTuple):
    """The losses and timesteps of a step."""

    losses: Tensor  # per sample, (B,), float32
    timesteps: Tensor  # (B,), in the family's own units


def encoded(parts: StepParts, batch: Batch, rng: torch.Generator) -> tuple[Batch, Tensor, TextCond]:
    """The batch as the denoiser reads it, its clean latents and its conditioning; see `batch_latents`."""
    return with_inpainting(parts, batch, rng), batch_latents(parts, batch, rng), batch_text(parts, batch)


def step_losses(parts: StepParts, batch: Batch, cond: TextCond, draw: NoiseDraw) -> Tensor:
    """The loss of every item of a batch for one draw of noise and time, (B,), float32."""
    prediction = parts.denoise(draw.noisy, draw.timesteps, cond, batch)
    return parts.objective.loss(prediction.float(), draw, batch.loss_weights, batch.masks)


def training_step(parts: StepParts, batch: Batch, rng: torch.Generator) -> StepResult:
    """The losses of one batch. All randomness of noise and time comes from `rng` (on the batch's device)."""
    if parts.draw is None:
        batch, latents, cond = encoded(parts, batch, rng)
        draw = parts.objective.draw(latents, rng, offsets=batch.timestep_offsets)
    else:
        cond, draw = batch_text(parts, batch), parts.draw(batch, rng)
    return StepResult(step_losses(parts, batch, cond, draw), draw.timesteps)
