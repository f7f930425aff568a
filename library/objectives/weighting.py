"""Weights of each item's loss by the signal-to-noise ratio of its timestep. All take and give (B,).

`snr` is the ratio of the plain schedule, always above 0, even where the zero-terminal schedule is trained.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]
SNR_CEILING = 1000.0  # first timesteps are nearly noiseless; their ratio would dwarf all others


def min_snr(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """``min(snr, gamma) / snr`` for epsilon, ``min(snr, gamma) / (snr + 1)`` for v. Source: arXiv:2303.09556."""
    capped = snr.clamp(max=gamma)
    return capped / (snr + 1) if prediction == "v_prediction" else capped / snr


def v_like_epsilon(snr: Tensor) -> Tensor:
    """``S / (S + 1)``: brings a v loss to the scale of an epsilon loss."""
    capped = snr.clamp(max=SNR_CEILING)
    return capped / (capped + 1)


def epsilon_like_v(snr: Tensor, share: float) -> Tensor:
    """``1 + share * (S + 1) / S``: adds to an epsilon loss its value on the scale of a v loss."""
    return 1 + share / v_like_epsilon(snr)


def debiased(snr: Tensor, prediction: Prediction) -> Tensor:
    """``1 / sqrt(S)`` for epsilon, ``1 / (S + 1)`` for v. Source: arXiv:2310.08442."""
    capped = snr.clamp(max=SNR_CEILING)
    return 1 / (capped + 1) if prediction == "v_prediction" else capped.rsqrt()
