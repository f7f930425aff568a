"""The noise that training adds: plain, with an offset per channel, at several resolutions, perturbed.

Every random number comes from the generator that is passed in, and nothing waits for the device.
"""

from __future__ import annotations

import hashlib
import random

import torch
from torch import Tensor
from torch.nn import functional


def standard_normal(latents: Tensor, generator: torch.Generator) -> Tensor:
    """float32 noise in the shape of `latents` (B, C, h, w)."""
    return _normal(latents.shape, generator)


def offset_noise(
    noise: Tensor,
    latents: Tensor,
    generator: torch.Generator,
    *,
    strength: float,
    random_strength: bool = False,
    adaptive_scale: float | None = None,
) -> Tensor:
    """Adds one normal number per item and channel, so that the model learns to change an image's mean.

    Args:
        noise, latents: (B, C, h, w); the latents as the denoiser sees them.
        strength: standard deviation of the offset.
        random_strength: multiplies the strength by one U(0, 1) for the whole batch.
        adaptive_scale: adds this times ``|mean of the item's channel|`` to the strength, which then stays >= 0.
    Source: N. Guttenberg, "Diffusion with Offset Noise", 2023.
    """
    scale: float | Tensor = strength
    if random_strength:
        scale = strength * _uniform(generator)
    if adaptive_scale is not None:
        scale = (scale + adaptive_scale * latents.mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0)
    return noise + scale * _normal((*noise.shape[:2], 1, 1), generator)


def multires_noise(noise: Tensor, generator: torch.Generator, *, iterations: int, discount: float) -> Tensor:
    """Adds ever coarser noise, enlarged bilinearly and weighted by ``discount ** i``, and scales to unit deviation.

    Layer i has each side divided by ``q ** i`` with a new q from U(2, 4); the last layer is the one with a side of 1.
    The deviation is the whole batch's.

    Source: J. Whitaker, "Multi-Resolution Noise for Diffusion Model Training", 2023.
    """
    batch, channels, height, width = noise.shape
    host = host_random(generator)  # sizes must be known here without asking the device
    for layer in range(iterations):
        shrink = (2 + 2 * host.random()) ** layer
        size = max(1, int(height / shrink)), max(1, int(width / shrink))
        coarse = _normal((batch, channels, *size), generator)
        noise = noise + discount**layer * functional.interpolate(coarse, size=(height, width), mode="bilinear")
        if 1 in size:
            break
    return noise / noise.std()


def perturbed_noise(
    noise: Tensor, generator: torch.Generator, *, gamma: float, random_strength: bool = False
) -> Tensor:
    """The noise to build noisy latents from, ``noise + gamma * other noise``; the target keeps the plain one.

    `random_strength` multiplies gamma by one U(0, 1) for the whole batch.

    Source: Ning et al. 2023, input perturbation (arXiv:2301.11706).
    """
    strength: float | Tensor = gamma * _uniform(generator) if random_strength else gamma
    return noise + strength * _normal(noise.shape, generator)


def host_random(generator: torch.Generator) -> random.Random:
    """Random numbers for Python that follow from the generator's present state, without drawing from it.

    Reading a value back from an accelerator would make the host wait; its generator's state is kept on the host.
    """
    state = generator.get_state().numpy().tobytes()
    return random.Random(hashlib.blake2b(state, digest_size=16).digest())


def _normal(shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _uniform(generator: torch.Generator) -> Tensor:
    return torch.rand((), generator=generator, device=generator.device)
