"""Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) over a batch of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from library.inference.control_images import control_batch
from library.inference.prompts import SamplePrompt
from library.inference.regions import CoupledText, Text, negative_text, positive_texts, words_of
from library.types import Batch, Denoise, Models, TextCond

if TYPE_CHECKING:
    from torch import Tensor

    from library.families.base import Family


@dataclass(frozen=True)
class Branch:
    """One of the predictions that are put together."""

    text: TextCond
    scale: float  # of its difference from the first branch; the first one's own is not used
    sizes: Batch


@dataclass(frozen=True)
class Guidance:
    """``first + sum of scale * (other - first)`` over the branches; with one of them, that alone."""

    denoise: Denoise
    branches: tuple[Branch, ...]
    together: Batch  # sizes of all branches, for one pass

    @staticmethod
    def of(
        family: Family,
        models: Models,
        prompts: Sequence[SamplePrompt],
        device: torch.device,
        cached: Mapping[Any, TextCond] | None,
        denoise: Denoise,
        control: Tensor | None = None,
    ) -> Guidance:
        """The branches of prompts that have the same scales.

        The negative prompt is the first branch. With a scale of its own it is pushed away from as far as that says,
        and an empty text is the first, as in composable diffusion (Liu et al. 2022, arXiv:2206.01714). The parts of a
        prompt without regions are put together in the same way, each with the whole scale. With scale 1 and one part
        the first branch would cancel out, and is left out.

        Args:
            cached: by `Text`.
            control: `Batch.control_latents` of the prompts.
        """
        scale, own_scale, coupled = prompts[0].scale, prompts[0].negative_scale, prompts[0].regions is not None

        def read(texts: Sequence[Text]) -> TextCond:
            words = [words_of(text) for text in texts]
            if cached is None:
                return family.text.encode(models, words, emphasis=True)
            cond = TextCond.cat([cached[text] for text in texts]).map(lambda tensor: tensor.to(device))
            return family.text.encode(models, words, emphasis=True, cached=cond) if models.text_encoders else cond

        parts = [read(texts) for texts in zip(*map(positive_texts, prompts), strict=True)]
        # Conditioning, scale, and whether it is for the negative side.
        wanted: list[tuple[TextCond, float, bool]] = [(part, scale, False) for part in parts]
        if coupled:
            wanted = [(CoupledText.of(parts), scale, False)]
        negatives = [negative_text(prompt, prompt.negative_prompt) for prompt in prompts]
        if own_scale is not None:
            empty = [negative_text(prompt, "") for prompt in prompts]
            wanted = [(read(empty), 0.0, True), *wanted, (read(negatives), -own_scale, True)]
        elif scale != 1.0 or len(wanted) > 1:
            wanted = [(read(negatives), 0.0, True), *wanted]
        branches = [
            Branch(cond, factor, _sizes([(prompt, negative) for prompt in prompts], device, control))
            for cond, factor, negative in wanted
        ]
        together = _sizes([(prompt, no) for _, _, no in wanted for prompt in prompts], device, control)
        return Guidance(denoise, tuple(branches), together)

    def with_inpainting(self, inpainting: Tensor) -> Guidance:
        """The same of a model that reads `Batch.inpainting`, (B, 1 + C, h, w)."""
        branches = [replace(branch, sizes=replace(branch.sizes, inpainting=inpainting)) for branch in self.branches]
        together = replace(self.together, inpainting=torch.cat([inpainting] * len(branches)))
        return replace(self, branches=tuple(branches), together=together)

    def predict(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        """float32, (B, C, h, w)."""
        first, *others = self._predictions(noisy, timestep)
        found = first
        for branch, prediction in zip(self.branches[1:], others, strict=True):
            found = found + branch.scale * (prediction - first)
        return found

    def _predictions(self, noisy: Tensor, timestep: Tensor) -> Sequence[Tensor]:
        """One for each branch, in one pass where their texts are equally long."""
        texts = [branch.text for branch in self.branches]
        shapes = {tuple((name, value.shape[1:]) for name, value in sorted(text.tensors.items())) for text in texts}
        coupled = any(isinstance(text, CoupledText) for text in texts)
        if len(texts) > 1 and len(shapes) == 1 and not coupled:
            noisy = torch.cat([noisy] * len(texts))
            return self._predict(noisy, timestep, TextCond.cat(texts), self.together).chunk(len(texts))
        return [self._predict(noisy, timestep, branch.text, branch.sizes) for branch in self.branches]

    def _predict(self, noisy: Tensor, timestep: Tensor, cond: TextCond, sizes: Batch) -> Tensor:
        timesteps = timestep.to(noisy.device).expand(len(noisy))
        if sizes.inpainting is not None and sizes.inpainting.shape[-2:] != noisy.shape[-2:]:  # latents that grow
            sizes = replace(sizes, inpainting=functional.interpolate(sizes.inpainting, noisy.shape[-2:]))
        return self.denoise(noisy, timesteps, cond, sizes).float()


def texts_read(prompt: SamplePrompt) -> list[Text]:
    """The texts whose conditioning the branches of a prompt need."""
    found = positive_texts(prompt)
    if prompt.negative_scale is not None:
        return [*found, negative_text(prompt, prompt.negative_prompt), negative_text(prompt, "")]
    if prompt.scale != 1.0 or (len(found) > 1 and prompt.regions is None):
        return [*found, negative_text(prompt, prompt.negative_prompt)]
    return found


def _sizes(rows: Sequence[tuple[SamplePrompt, bool]], device: torch.device, control_latents: Tensor | None) -> Batch:
    """The size, guidance and control conditioning of images: uncropped, of the requested size, or as prompts say.

    Args:
        rows: prompts, and whether it is for the negative side.
        control_latents: of the prompts, which follow each other as often as there are branches.
    """
    prompts = [prompt for prompt, _ in rows]
    target = torch.tensor([(prompt.width, prompt.height) for prompt in prompts], device=device)
    original = []  # what a model with size conditioning is given as the width and height of the original image
    for prompt, negative in rows:
        sizes = prompt.sizes
        width = prompt.width if sizes.original_width is None else sizes.original_width
        height = prompt.height if sizes.original_height is None else sizes.original_height
        if negative:
            width = width if sizes.negative_width is None else sizes.negative_width
            height = height if sizes.negative_height is None else sizes.negative_height
        original.append((width, height))
    return Batch(
        captions=[prompt.prompt for prompt in prompts],
        latents=None,
        pixels=None,
        loss_weights=torch.ones(len(prompts), device=device),
        masks=None,
        original_sizes=torch.tensor(original, device=device),
        crop_top_lefts=torch.tensor([(p.sizes.crop_top, p.sizes.crop_left) for p in prompts], device=device),
        target_sizes=target,
        guidance=prompts[0].guidance,
        control=control_batch(prompts, device) if control_latents is None else None,
        control_latents=None
        if control_latents is None
        else control_latents.repeat(len(rows) // len(control_latents), 1, 1, 1),
    )
