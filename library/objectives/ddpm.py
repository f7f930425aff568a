"""Denoising diffusion with Stable Diffusion's schedule: noise levels, noisy latents, targets. Pure functions.

T = 1000 timesteps; alpha_bar is the share of signal variance that is left, so that
``x_t = sqrt(alpha_bar_t) * x_0 + sqrt(1 - alpha_bar_t) * noise`` (Ho et al. 2020, arXiv:2006.11239, eq. 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


def scaled_linear_betas() -> Tensor:
    """Per-step noise variances, (1000,), float64: linear in their square roots.

    Source: Rombach et al. 2022 (arXiv:2112.10752) and the configurations published with Stable Diffusion.
    """
    return torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2


def alpha_bars(betas: Tensor) -> Tensor:
    """Cumulative product of ``1 - beta``: the signal's share of the variance at each timestep, in [0, 1]."""
    return torch.cumprod(1 - betas, dim=0)


def signal_to_noise(alpha_bar: Tensor) -> Tensor:
    """``alpha_bar / (1 - alpha_bar)``, the signal-to-noise ratio of the noisy latents."""
    return alpha_bar / (1 - alpha_bar)


def zero_terminal(alpha_bar: Tensor) -> Tensor:
    """Shifts and stretches the signal level so that it keeps its first value and ends in pure noise (exactly 0).

    Source: Lin et al. 2024 (arXiv:2305.08891), algorithm 1.
    """
    level = alpha_bar.sqrt()
    return ((level - level[-1]) * level[0] / (level[0] - level[-1])) ** 2


def betas_of(alpha_bar: Tensor) -> Tensor:
    """The betas whose `alpha_bars` are `alpha_bar`: one minus the successive ratios."""
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Noisy latents ``sqrt(alpha_bar) * latents + sqrt(1 - alpha_bar) * noise``.

    Args:
        latents: clean latents as the denoiser sees them (scaled), (B, C, h, w).
        noise: same shape.
        alpha_bar: of each item's timestep, (B,).
    """
    signal, sigma = _levels(alpha_bar, latents)
    return signal * latents + sigma * noise


def velocity(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The v target ``sqrt(alpha_bar) * noise - sqrt(1 - alpha_bar) * latents``; shapes as in `add_noise`.

    Source: Salimans and Ho 2022 (arXiv:2202.00512), appendix D.
    """
    signal, sigma = _levels(alpha_bar, latents)
    return signal * noise - sigma * latents


def _levels(alpha_bar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    column = alpha_bar.view(-1, *[1] * (like.ndim - 1))
    return column.sqrt(), (1 - column).sqrt()
