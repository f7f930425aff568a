"""The mathematics of LoRA as pure tensor functions. r is the rank, k the size of a convolution's kernel.

Source: Hu et al. 2021 (arXiv:2106.09685), sec. 4.1; for convolutions the down matrix keeps the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def effective_alpha(alpha: float | None, rank: int) -> float:
    """Alpha as files hold it: none, or 0, stands for the rank (a scale of 1)."""
    return float(alpha) if alpha else float(rank)


def delta(down: Tensor, up: Tensor) -> Tensor:
    """The change of the adapted weight, before ``alpha / r``.

    Args:
        down: (r, in) or (r, in, k, k).
        up: (out, r) or (out, r, 1, 1).
    Returns: (out, in) for a linear down matrix, (out, in, k, k) for a convolution's.
    """
    flat = up.flatten(1) @ down.flatten(1)
    return flat.reshape(up.shape[0], *down.shape[1:])


def delta_norm(down: Tensor, up: Tensor) -> Tensor:
    """Frobenius norm of ``delta(down, up)``, 0-dim float32, without forming it.

    ``|UD|^2 = tr((U^T U)(D D^T))`` needs two r x r products only.
    """
    d, u = down.detach().float().flatten(1), up.detach().float().flatten(1)
    return ((u.T @ u) * (d @ d.T)).sum().clamp(min=0).sqrt()


def max_norm_factor(down: Tensor, up: Tensor, scale: float, limit: float) -> Tensor:
    """What both matrices must be multiplied by so that ``|scale * up @ down|`` is at most `limit`; 0-dim float32.

    1 where nothing is to be done. Stays on the device. Source: the max-norm rule of `--scale_weight_norms`.
    """
    norm = (abs(scale) * delta_norm(down, up)).clamp(min=limit / 2)
    return (limit / norm).clamp(max=1).sqrt()


def fit_kernel(matrix: Tensor, like: Tensor | torch.Size) -> Tensor:
    """A matrix of a file in the shape that the live layer has: (a, b) and (a, b, 1, 1) mean the same.

    Raises: ValueError: the two shapes differ in more than that.
    """
    shape = torch.Size(like if isinstance(like, torch.Size) else like.shape)
    if _squeezed(matrix.shape) != _squeezed(shape):
        raise ValueError(f"shape {tuple(matrix.shape)} does not fit {tuple(shape)}")
    return matrix.reshape(shape)


def _squeezed(shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape[:2]) if len(shape) == 4 and shape[2:] == (1, 1) else tuple(shape)
