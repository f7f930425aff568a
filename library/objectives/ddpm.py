"""Denoising diffusion with Stable Diffusion's schedule: noise levels, noisy latents, targets. Pure functions.

T = 1000 timesteps; alpha_bar is the share of signal variance that is left, so that
``x_t = sqrt(alpha_bar_t) * x_0 + sqrt(1 - alpha_bar_t) * noise`` (Ho et al. 2020, arXiv:2006.11239, eq. 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012
LEAST_SIGNAL = 2.0**-24  # of the variance, where a division needs some


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


def clean_from_noise(noisy: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latents that predicted noise implies: `add_noise` solved for them; shapes as there.

    Where no signal is left (alpha_bar 0) noise says nothing of them; the least signal stands in.
    """
    signal, sigma = _levels(alpha_bar.clamp(min=LEAST_SIGNAL), noisy)
    return (noisy - sigma * noise) / signal


def clean_from_velocity(noisy: Tensor, velocity: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latents that a predicted v implies: ``sqrt(alpha_bar) * noisy - sqrt(1 - alpha_bar) * v``."""
    signal, sigma = _levels(alpha_bar, noisy)
    return signal * noisy - sigma * velocity


def ancestral_step(noisy: Tensor, clean: Tensor, alpha_bar: Tensor, then: Tensor, noise: Tensor) -> Tensor:
    """Noisy latents at a lower level, drawn from the posterior that `clean` and `noisy` give (Ho et al. 2020, eq. 7).

    With a = alpha_bar / then and b = 1 - a, the mean is ``(sqrt(then) b clean + sqrt(a) (1 - then) noisy) /
    (1 - alpha_bar)`` and the variance ``(1 - then) / (1 - alpha_bar) * b``.

    Args:
        clean: what the prediction at `noisy` implies, (B, C, h, w).
        alpha_bar, then: the signal's share before and after the step, (B,); `then` is the larger.
        noise: standard normal, (B, C, h, w).
    """
    ratio = alpha_bar / then
    left, before = 1 - ratio, 1 - alpha_bar

    def column(value: Tensor) -> Tensor:
        return value.view(-1, *[1] * (noisy.ndim - 1))

    mean = column(then.sqrt() * left / before) * clean + column(ratio.sqrt() * (1 - then) / before) * noisy
    return mean + column(((1 - then) / before * left).sqrt()) * noise


def _levels(alpha_bar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    column = alpha_bar.view(-1, *[1] * (like.ndim - 1))
    return column.sqrt(), (1 - column).sqrt()
