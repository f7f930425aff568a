"""Pointwise losses between prediction and target, and the switch point of the Huber types."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

LossType = Literal["l2", "l1", "huber", "smooth_l1"]
HuberSchedule = Literal["constant", "exponential", "snr"]
HUBER_TYPES = ("huber", "smooth_l1")


def pointwise(prediction: Tensor, target: Tensor, loss_type: LossType, huber_c: Tensor | None = None) -> Tensor:
    """The loss of every element, same shape as the inputs (B, ...), float32.

    With d = prediction - target: l2 d², l1 |d|, huber 2c(√(d² + c²) - c), smooth_l1 2(√(d² + c²) - c). The Huber types
    are the smooth "pseudo" ones: near d²  (huber) or d²/c (smooth_l1) for small d, linear for large d.

    Args:
        huber_c: switch point c of each item, (B,), in units of the prediction; for the Huber types only.
    """
    difference = prediction.float() - target.float()
    if loss_type == "l2":
        return difference.square()
    if loss_type == "l1":
        return difference.abs()
    c = huber_c.view(-1, *[1] * (difference.ndim - 1))
    # √(d² + c²) - c, written so that a small d does not drown in c
    excess = difference.square() / ((difference.square() + c.square()).sqrt() + c)
    return 2 * c * excess if loss_type == "huber" else 2 * excess


def huber_switch_point(
    schedule: HuberSchedule, timesteps: Tensor, alpha_bar: Tensor | None, *, huber_c: float, scale: float, horizon: int
) -> Tensor:
    """The switch point c of each item, (B,), float32.

    constant: huber_c · scale. exponential: huber_c^(t / horizon) · scale, from 1 at t = 0 to huber_c at the end.
    snr: ((1 - huber_c) / (1 + σ)² + huber_c) · scale with σ = √((1 - alpha_bar) / alpha_bar).

    Args:
        timesteps, alpha_bar: of each item, (B,). Only snr needs alpha_bar.
        huber_c: the smallest switch point, above 0.
        horizon: number of timesteps of the diffusion.
    Source: Khrapov et al. 2024, scheduled pseudo-Huber loss (arXiv:2403.16728).
    """
    if schedule == "constant":
        return torch.full_like(timesteps, huber_c * scale, dtype=torch.float32)
    if schedule == "exponential":
        return torch.exp(timesteps.float() * (math.log(huber_c) / horizon)) * scale
    # 1 / (1 + σ)² without σ, which is infinite where no signal is left
    nearness = alpha_bar / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt()).square()
    return ((1 - huber_c) * nearness + huber_c) * scale
