"""Roles that several families have in the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from library.families.base import Denoiser, Latents
from library.families.shared.unet import unet_blocks
from library.families.shared.vae import decode_latents, encode_pixels
from library.objectives.objective import DdpmObjective

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.objectives.objective import Objective
    from library.types import Models


class VaeLatents(Latents):
    """Latents of AutoencoderKL, which the denoiser sees as (latents - shift) * scale.

    Args: cached_scaled: whether caches hold them in that form instead of as the VAE gives them.
    """

    def __init__(self, scale: float, shift: float = 0.0, *, cached_scaled: bool = False):
        self._scale, self._shift, self._cached_scaled = scale, shift, cached_scaled

    def encode(
        self, models: Models, pixels: Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> Tensor:
        latents = encode_pixels(_vae(models), pixels, generator)
        return (latents - self._shift) * self._scale if self._cached_scaled else latents

    def scale(self, latents: Tensor) -> Tensor:
        return latents if self._cached_scaled else (latents - self._shift) * self._scale

    def decode(self, models: Models, latents: Tensor) -> Tensor:
        return decode_latents(_vae(models), latents / self._scale + self._shift)


def _vae(models: Models) -> nn.Module:
    assert models.vae is not None, "the VAE was dropped"
    return models.vae


class UnetDenoiser(Denoiser):
    """U-Nets trained by DDPM; families add `predict`."""

    def objective(self) -> Objective:
        return DdpmObjective(self.prediction_type(), self.opts.noise, self.opts.loss)

    def prediction_type(self) -> Literal["epsilon", "v_prediction", "flow"]:
        return "v_prediction" if self.opts.family.v_parameterization else "epsilon"

    def blocks(self, models: Models) -> list[nn.Module]:
        return unet_blocks(models.denoiser)
