"""The images that drawing begins with: reading them and their masks, and their latents while steps are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from library.data.sample import images
from library.errors import UserError
from library.inference.prompts import SamplePrompt
from library.types import Size

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from library.families.base import Family
    from library.types import Models

_KEPT_BELOW = 128  # grey value of the mask


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
    if sources[0].mask is None:
        return Source(latents, None)
    masks = torch.stack([torch.from_numpy(source.mask_pixels >= _KEPT_BELOW).float() for source in sources])
    small = functional.interpolate(masks[:, None], size=latents.shape[-2:], mode="nearest")
    return Source(latents, small.to(device))


def _read(path: Path, what: str, read: Callable[[Path], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the {what} cannot be read ({images.reason(error)})") from None
