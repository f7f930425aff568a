"""One training step of concept editing: the noisy latents, and what the prediction for a prompt should be there.

A new image of the target prompt is begun with the network and left unfinished; where that is, the bare model says what
it predicts for three other prompts. With e(text) for those predictions, g for the pair's guidance scale, and x for the
unfinished image, the goal is

    erase:    e(neutral) - g (e(positive) - e(unconditional))
    enhance:  e(neutral) + g (e(positive) - e(unconditional))

and the loss compares the prediction for the target, with the network at the pair's strength, with it. For models of
rectified flow e is the velocity. Velocity, noise and v are all, at one x and one time, the same function of the clean
image that they imply, up to a factor and x itself, and the weights 1, g and -g sum to 1: so the goal says the same in
each of them, that the clean image should be clean(neutral) -+ g (clean(positive) - clean(unconditional)).

Source: Gandikota et al. 2023, Erasing Concepts from Diffusion Models (arXiv:2303.07345), equation 7, and Concept
Sliders (arXiv:2311.12092), equation 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.objectives.noise import host_random
from library.types import Batch, NoiseDraw, TextCond

if TYPE_CHECKING:
    from library.families.base import Family
    from library.methods.base import Method
    from library.methods.leco_data import PairBatch
    from library.objectives.objective import Objective
    from library.types import Denoise, Draw, FamilyTraits


def make_draw(method: Method, family: Family, objective: Objective, denoise: Denoise) -> Draw:
    """What makes of a `PairBatch` noisy latents, their times, and the goal of the prediction.

    Raises: UserError: --min_timestep and --max_timestep leave no time at which an image could be left unfinished.
    """
    if family.traits.flow_shift is None:  # else the times follow from the size, and the first step checks them
        unfinished(objective, method.opts.method.max_denoising_steps, 1.0)
    return partial(_draw, method, family.traits, objective, denoise, _drawn_times)


def make_planned_draw(method: Method, family: Family, objective: Objective, denoise: Denoise) -> Draw:
    """The same with images that are always left after half of their steps; no time is read."""
    return partial(_draw, method, family.traits, objective, denoise, _half_of_the_times)


def _drawn_times(objective: Objective, steps: int, shift: float, rng: torch.Generator) -> tuple[Tensor, int]:
    """The times of a schedule, and after how many of its steps this image is left."""
    times, counts = unfinished(objective, steps, shift)
    return times, host_random(rng).choice(counts)


def _half_of_the_times(objective: Objective, steps: int, shift: float, rng: torch.Generator) -> tuple[Tensor, int]:
    return objective.sampling_times(steps, shift), steps // 2


def unfinished(objective: Objective, steps: int, shift: float) -> tuple[Tensor, list[int]]:
    """The times of a schedule, and after how many of its steps an image may be left: not at once, nor at the end.

    Raises: UserError: none of those times is trained.
    """
    times, (low, high) = objective.sampling_times(steps, shift), objective.span
    counts = [count for count, time in enumerate(times.tolist()) if count and low <= time < high]
    if not counts:
        raise UserError(
            f"--min_timestep: of {steps} steps (--max_denoising_steps) none but the first begins at a timestep from "
            f"{low} to {high - 1}; leave a wider range"
        )
    return times, counts


def _draw(
    method: Method,
    traits: FamilyTraits,
    objective: Objective,
    denoise: Denoise,
    choose: Callable[[Objective, int, float, torch.Generator], tuple[Tensor, int]],
    batch: PairBatch,
    rng: torch.Generator,
) -> NoiseDraw:
    with torch.no_grad(), _evaluating(method.trainable()):
        options = method.opts.method
        draw = begin_image(
            objective,
            denoise,
            batch,
            rng,
            traits=traits,
            steps=options.max_denoising_steps,
            scale=options.leco_denoise_guidance_scale,
            choose=choose,
        )
        method.set_strength(0.0)
        try:
            goal = goal_of(denoise, draw.noisy, draw.timesteps, batch)
        finally:
            method.set_strength(batch.network_multiplier)
    # Autocast keeps the weights that it has cast; those cast here have no gradients.
    torch.clear_autocast_cache()
    return replace(draw, target=objective.to_target_space(goal, draw))


def begin_image(
    objective: Objective,
    denoise: Denoise,
    batch: PairBatch,
    rng: torch.Generator,
    *,
    traits: FamilyTraits,
    steps: int,
    scale: float,
    choose: Callable[[Objective, int, float, torch.Generator], tuple[Tensor, int]] = _drawn_times,
) -> NoiseDraw:
    """Makes some of `steps` steps from noise towards images of the target, with guidance `scale`.

    Args: choose: gives the times of a schedule, and how many of its steps are made.
    Returns: a draw whose target is to be filled in.
    """
    stride, count = traits.latent_stride, len(batch.captions)
    height, width = batch.size.height // stride, batch.size.width // stride
    shift = 1.0 if traits.flow_shift is None else traits.flow_shift(height, width)
    times, made = choose(objective, steps, shift, rng)
    times = times.to(rng.device, non_blocking=True)
    noise = objective.noise(torch.zeros(count, traits.latent_channels, height, width, device=rng.device), rng)
    latents, conds = noise, [batch.unconditional, batch.text]
    if scale == 1:
        conds = conds[1:]
    for step in range(made):
        now, then = times[step].expand(count), times[step + 1].expand(count)
        first, *others = predictions(denoise, latents, now, conds, batch)
        prediction = first + scale * (others[0] - first) if others else first
        latents = objective.step_back(latents, prediction, now, then, rng)
    return NoiseDraw(noisy=latents, timesteps=times[made].expand(count), target=latents, noise=noise)


def goal_of(denoise: Denoise, noisy: Tensor, timesteps: Tensor, batch: PairBatch) -> Tensor:
    """What the prediction for the target should be, float32, (B, C, h, w). `denoise` is the bare model's here."""
    pair = batch.pair
    conds = {
        pair.positive: batch.positive,
        pair.neutral: batch.neutral,
        pair.unconditional: batch.unconditional,
    }
    found = dict(zip(conds, predictions(denoise, noisy, timesteps, list(conds.values()), batch), strict=True))
    direction = found[pair.positive] - found[pair.unconditional]
    sign = -1 if pair.action == "erase" else 1
    return found[pair.neutral] + sign * pair.guidance_scale * direction


def predictions(
    denoise: Denoise, noisy: Tensor, timesteps: Tensor, conds: Sequence[TextCond], batch: Batch
) -> Sequence[Tensor]:
    """A prediction for each conditioning, float32, (B, C, h, w), in one pass."""
    several = len(conds)
    sizes = {
        name: getattr(batch, name).repeat(several, 1) for name in ("original_sizes", "crop_top_lefts", "target_sizes")
    }
    together = replace(batch, **sizes)
    out = denoise(torch.cat([noisy] * several), timesteps.repeat(several), TextCond.cat(conds), together)
    return out.float().chunk(several)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout, as the network will be used."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)
