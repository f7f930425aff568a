"""The mathematics of LoRA as pure tensor functions. r is the rank, k the size of a convolution's kernel.

Source: Hu et al. 2021 (arXiv:2106.09685), sec. 4.1; for convolutions the down matrix keeps the kernel.
"""

from __future__ import annotations

from typing import Any

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
    d, u = down.float().flatten(1), up.float().flatten(1)
    return ((u.T @ u) * (d @ d.T)).sum().clamp(min=0).sqrt()


def max_norm_factor(down: Tensor, up: Tensor, scale: float, limit: float) -> Tensor:
    """What both matrices must be multiplied by so that ``|scale * up @ down|`` is at most `limit`; 0-dim float32.

    1 where nothing is to be done, as for a norm of 0. Stays on the device. Source: the rule of `--scale_weight_norms`.
    """
    norm = abs(scale) * delta_norm(down, up)
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


def tucker(core: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """A Tucker decomposition: (r, s, ...), (r, a), (s, b) -> (a, b, ...)."""
    return torch.einsum("rs...,ra,sb->ab...", core, first, second)


def kronecker(first: Tensor, second: Tensor) -> Tensor:
    """(l, m), (k, n, ...) -> (l k, m n, ...)."""
    expanded = first.reshape(*first.shape, *[1] * (second.dim() - 2))
    return torch.kron(expanded, second.contiguous())


def in_computing_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast would have them, for a function whose backward pass multiplies them without it."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


class Hadamard(torch.autograd.Function):
    """``(a1 @ b1) * (a2 @ b2)``, of which only the four factors are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(a1, b1, a2, b2)
        return (a1 @ b1) * (a2 @ b2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        a1, b1, a2, b2 = ctx.saved_tensors
        first = gradient * (a2 @ b2)
        grads = [first @ b1.T, a1.T @ first]
        del first
        second = gradient * (a1 @ b1)
        return (*grads, second @ b2.T, a2.T @ second)


def cayley(skew: Tensor) -> Tensor:
    """Rotations ``(I + Q) (I - Q)^-1`` of skew-symmetric matrices Q, (..., b, b).

    With Q skew the transpose of the result is the solution X of ``(I + Q) X = I - Q``.
    """
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(identity + skew, identity - skew).mT
