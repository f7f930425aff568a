"""A product of two matrices that is added to a module's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_product(output: Tensor, hidden: Tensor, up: Tensor, factor: float, *, into: bool = False) -> Tensor:
    """``output + factor * hidden @ up.T``, (..., n) + (..., r) @ (r, n), all of one dtype.

    One operation, and two in the backward pass: the factor is part of them.

    Args: into: `output` may be overwritten. Where it was saved for a backward pass, that fails.
    """
    if torch.compiler.is_compiling():  # which decides about operations and memory itself
        return _added(output, hidden, up, factor)
    return _AddProduct.apply(output, hidden, up, factor, into and output.is_contiguous())


def _added(output: Tensor, hidden: Tensor, up: Tensor, factor: float) -> Tensor:
    rows = output.reshape(-1, output.shape[-1])
    return torch.addmm(rows, hidden.reshape(-1, hidden.shape[-1]), up.t(), alpha=factor).view(output.shape)


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, hidden: Tensor, up: Tensor, factor: float, into: bool) -> Tensor:
        ctx.save_for_backward(hidden, up)
        ctx.factor = factor
        if not into:
            return _added(output, hidden, up, factor)
        # Not `mark_dirty`: the output of a linear layer is a view to autograd, whose backward pass would then copy it
        # several times. This shares its version counter, by which
        # autograd notices if it was saved.
        result = output.detach()
        result.view(-1, result.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), up.t(), alpha=factor)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, up = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_hidden = of_up = None
        if ctx.needs_input_grad[1]:
            of_hidden = _times(rows, up, ctx.factor).view(hidden.shape)
        if ctx.needs_input_grad[2]:
            of_up = _times(rows.t(), hidden.reshape(-1, hidden.shape[-1]), ctx.factor)
        # In rows, as the module's own backward pass wants it: if this has copied it, that need not.
        return rows.view(gradient.shape), of_hidden, of_up, None, None


def _times(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """``factor * left @ right``, one operation."""
    if factor == 1:
        return left @ right
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=factor)  # at 0 its content is not looked at
