"""The latents of Gradual Latent: smaller ones at the beginning, and the steps that enlarge them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

    from library.inference.gradual_latent import GradualLatent, Sides


def resized(latents: Tensor, size: Sides) -> Tensor:
    """Latents (B, C, h, w) of another size, bicubically."""
    return functional.interpolate(latents.float(), size=size, mode="bicubic", align_corners=False)


def shrunk(latents: Tensor, gradual: GradualLatent) -> Tensor:
    """Latents (B, C, h, w) as small as they are at the beginning."""
    return sharpened(resized(latents, gradual.smallest(tuple(latents.shape[-2:]))), gradual)


def sharpened(latents: Tensor, gradual: GradualLatent) -> Tensor:
    """``x + strength * (x - blurred(x))``, with a Gaussian blur; as they are where none is asked for."""
    if gradual.unsharp is None:
        return latents
    size, sigma, strength = int(gradual.unsharp[0]), *gradual.unsharp[1:3]
    offsets = torch.arange(size, dtype=torch.float32, device=latents.device) - (size - 1) / 2
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(latents.shape[1], 1, 1, size)
    # Small latents have too little to mirror at their edges: these are repeated in place of that.
    margin = size // 2
    mode = "reflect" if margin < min(latents.shape[-2:]) else "replicate"
    around = functional.pad(latents, (margin, margin, margin, margin), mode=mode)
    rows = functional.conv2d(around, kernel, groups=latents.shape[1])
    blurred = functional.conv2d(rows, kernel.transpose(-1, -2), groups=latents.shape[1])
    return latents + strength * (latents - blurred)


def enlarging_step(
    scheduler: Any,
    prediction: Tensor,
    timestep: Tensor,
    latents: Tensor,
    size: Sides,
    gradual: GradualLatent,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """The ancestral step of Euler's method (Song et al. 2021, arXiv:2011.13456; k-diffusion's ``euler_a``) to a size.

    It is also what Euler's sampler takes where latents grow, whose noise would not have the size's own grain otherwise.

    Args:
        scheduler: of diffusers, one of those with sigmas, at the timestep.
        generators: one for each image, on the CPU.
    """
    assert scheduler.step_index is not None, "scale_model_input was called"
    now, after = (float(scheduler.sigmas[scheduler.step_index + offset]) for offset in (0, 1))
    # The scheduler moves on by its own step, whose noise has the old size and so is not used.
    step = scheduler.step(prediction, timestep, latents, generator=torch.Generator().manual_seed(0))
    direction = (latents - step.pred_original_sample) / now
    added = (after**2 * (now**2 - after**2) / now**2) ** 0.5
    length = (after**2 - added**2) ** 0.5 - now
    if gradual.unsharp is None or len(gradual.unsharp) == 3 or gradual.unsharp[3]:
        large = sharpened(resized(latents + direction * length, size), gradual)
    else:
        large = sharpened(resized(latents, size), gradual) + resized(direction, size) * length
    noise = torch.stack([torch.randn((latents.shape[1], *size), generator=generator) for generator in generators])
    return large + noise.to(large.device) * added * gradual.s_noise
