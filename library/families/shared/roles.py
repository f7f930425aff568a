"""Roles that several families have in the same way."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal

from library.families.base import Denoiser, Latents
from library.families.shared.unet import unet_blocks
from library.families.shared.vae import decode_latents, encode_pixels
from library.objectives.objective import DdpmObjective

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.objectives.objective import Objective
    from library.types import Batch, Models, Residuals, TextCond


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
    """U-Nets trained by DDPM; families add `inputs`."""

    @abstractmethod
    def inputs(self, noisy: Tensor, cond: TextCond, batch: Batch | None) -> dict[str, Any]:
        """What the U-Net, and a ControlNet of it, take beside latents and timesteps, by the names of diffusers."""

    def predict(
        self,
        models: Models,
        noisy: Tensor,
        timesteps: Tensor,
        cond: TextCond,
        batch: Batch | None = None,
        residuals: Residuals | None = None,
    ) -> Tensor:
        """See `Denoiser.predict`. The last of the residuals is for the middle block."""
        import torch

        inputs = self.inputs(noisy, cond, batch)
        if batch is not None and batch.inpainting is not None:
            noisy = torch.cat([noisy, batch.inpainting.to(noisy.dtype)], dim=1)
        if residuals is not None:
            *down, middle = residuals
            inputs |= {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return models.denoiser(noisy, timesteps, **inputs).sample

    def objective(self) -> Objective:
        return DdpmObjective(self.prediction_type(), self.opts.noise, self.opts.loss)

    def prediction_type(self) -> Literal["epsilon", "v_prediction", "flow"]:
        return "v_prediction" if self.opts.family.v_parameterization else "epsilon"

    def blocks(self, models: Models) -> list[nn.Module]:
        return unet_blocks(models.denoiser)
