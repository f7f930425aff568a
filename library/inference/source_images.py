"""The images that drawing begins with: reading them and their masks, and their latents while steps are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from library.data.sample import images
from library.data.sample.rendering import BRIGHT
from library.errors import UserError
from library.inference.growing import resized
from library.inference.prompts import SamplePrompt
from library.types import Size

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from library.families.base import Family
    from library.inference.prompts import SourceImage
    from library.types import Models


@dataclass(frozen=True)
class Source:
    """Images of a batch as latents, and what of them is drawn again."""

    latents: Tensor  # (B, C, h, w), float32, scaled
    mask: Tensor | None  # (B, 1, h, w): 1 is drawn again, 0 is kept; None: all is drawn again

    def noised(self, scheduler: Any, noise: Tensor, timestep: Tensor) -> Tensor:
        """The latents as they are at a timestep, (1,), of the scheduler; without one as they are."""
        if not len(timestep):
            return self.latents
        if hasattr(scheduler, "scale_noise"):
            return scheduler.scale_noise(self.latents, timestep, noise)
        return scheduler.add_noise(self.latents, noise, timestep)

    def keep(self, latents: Tensor, scheduler: Any, noise: Tensor, next_timestep: Tensor) -> Tensor:
        """The latents of a step with the source, as it is at the next one, in the place of what is kept.

        As by Avrahami et al. 2022, "Blended Latent Diffusion" (arXiv:2206.02779).
        """
        size = latents.shape[-2:]
        if size != self.mask.shape[-2:]:  # latents that grow
            small = Source(resized(self.latents, size), functional.interpolate(self.mask, size=size))
            return small.keep(latents, scheduler, resized(noise, size), next_timestep)
        return self.mask * latents + (1 - self.mask) * self.noised(scheduler, noise, next_timestep)


def with_source(prompt: SamplePrompt) -> SamplePrompt:
    """The prompt with its source image and mask read and resized to the size of the sample.

    Raises: UserError: a file cannot be read.
    """
    source = prompt.source
    if source is None:
        return prompt
    size, pixels, mask = Size(prompt.width, prompt.height), source.pixels, source.mask_pixels
    if pixels is None and source.latents is None:
        pixels = images.resize(_read(source.path, "image", images.read_image), size)
    if mask is None and source.mask is not None:
        mask = images.resize_values(_read(source.mask, "mask", images.read_values), size).max(axis=2)
    return replace(prompt, source=replace(source, pixels=pixels, mask_pixels=mask))


def encode_sources(
    family: Family,
    models: Models,
    prompts: Sequence[SamplePrompt],
    generators: list[torch.Generator],
    device: torch.device,
) -> Source:
    """The sources of prompts that all have one. Latents are drawn by each image's own generator.

    Raises: UserError: a file cannot be read.
    """
    sources = [with_source(prompt).source for prompt in prompts]
    if sources[0].latents is not None:
        latents = torch.stack([source.latents for source in sources]).to(device)
    else:
        pixels = torch.stack([images.to_pixels(source.pixels) for source in sources])
        latents = family.latents.scale(family.latents.encode(models, pixels.to(device), generators)).float()
    if not sources[0].is_masked:
        return Source(latents, None)
    return Source(latents, functional.interpolate(_masks(sources).to(device), size=latents.shape[-2:]))


def encode_inpainting(
    family: Family,
    models: Models,
    prompts: Sequence[SamplePrompt],
    generators: list[torch.Generator],
    device: torch.device,
) -> Tensor:
    """`Batch.inpainting` of prompts. Without a mask all is drawn, so that nothing is left of an image.

    Raises: UserError: a file cannot be read.
    """
    sources = [with_source(prompt).source for prompt in prompts]
    height, width = prompts[0].height, prompts[0].width
    first = sources[0]
    if first is None or not first.is_masked:
        masks = torch.ones(len(prompts), 1, height, width, device=device)
        pixels = torch.zeros(len(prompts), 3, height, width, device=device)
    else:
        masks = _masks(sources).to(device)
        if first.pixels is not None:
            pixels = torch.stack([images.to_pixels(source.pixels) for source in sources]).to(device)
        else:  # latents are what drawing begins with
            latents = torch.stack([source.latents for source in sources]).to(device)
            pixels = family.latents.decode(models, latents).float().clamp(-1, 1)
    return family.latents.inpainting_input(models, pixels, masks, generators)


def _masks(sources: Sequence[SourceImage]) -> Tensor:
    """(B, 1, H, W): 1 is drawn again, 0 is kept."""
    return torch.stack([torch.from_numpy(source.mask_pixels >= BRIGHT).float() for source in sources])[:, None]


def _read(path: Path, what: str, read: Callable[[Path], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the {what} cannot be read ({images.reason(error)})") from None
