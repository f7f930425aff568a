"""Squared norms of a frozen weight with its change, for weight decomposition (DoRA, arXiv:2402.09353).

Neither function keeps anything of the weight's size for the backward pass but the weight itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LowRankSquares(torch.autograd.Function):
    """``|W_i + s u_i D|^2`` for every row i: (n, m), (n, r), (r, m) -> (n,), without forming ``u D``.

    ``|W_i|^2 + 2 s <W_i D^T, u_i> + s^2 <u_i (D D^T), u_i>`` needs products of the rank's width only.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
        with _exact(up):
            own = weight.to(up.dtype)
            through = own @ down.T
            cross, square = (through * up).sum(1), ((up @ (down @ down.T)) * up).sum(1)
            squares = torch.linalg.vector_norm(own, dim=1).square() + 2 * scale * cross + scale**2 * square
        ctx.save_for_backward(weight, up, down, through)
        ctx.scale = scale
        return squares

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, None]:
        weight, up, down, through = ctx.saved_tensors
        with _exact(up):
            slope = 2 * ctx.scale * gradient[:, None]
            weighted = up * slope
            grad_up = slope * (through + (up @ (down @ down.T)) * ctx.scale)
            grad_down = weighted.T @ weight.to(up.dtype) + ctx.scale * (weighted.T @ up) @ down
        return None, grad_up, grad_down, None


class RebuiltSquares(torch.autograd.Function):
    """The same by rows or columns of ``W + s C`` for a change C of any kind, which is built for each pass."""

    @staticmethod
    def forward(
        ctx: Any, build: Callable[..., Tensor], weight: Tensor, scale: float, axis: int, *tensors: Tensor
    ) -> Tensor:
        """`build` makes the change, in the shape of `weight`, (n, m), of `tensors`; `axis`: over which is summed."""
        with _exact(tensors[0]):
            whole = (build(*tensors) * scale).add_(weight)
        ctx.save_for_backward(weight, *tensors)
        ctx.build, ctx.scale, ctx.axis = build, scale, axis
        return torch.linalg.vector_norm(whole, dim=axis).square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        with _exact(gradient), torch.enable_grad():
            tensors = [tensor.detach().requires_grad_() for tensor in tensors]
            change = ctx.build(*tensors)
            slope = 2 * ctx.scale * gradient.unsqueeze(ctx.axis)
            outer = (change.detach() * ctx.scale).add_(weight).mul_(slope)
            return None, None, None, None, *torch.autograd.grad(change, tensors, outer)


def root(squares: Tensor) -> Tensor:
    """Norms of squared norms, whose gradient is 0 where a weight's row is 0."""
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()


def _exact(tensor: Tensor) -> torch.autocast:
    """Norms in the dtype of what is trained: they are ratios close to 1."""
    return torch.autocast(tensor.device.type, enabled=False)
