"""Activations that keep less for the backward pass than autograd would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def keep_gates_only(model: nn.Module) -> int:
    """Lets GEGLU layers keep what their linear layer gives, and not the gate's GELU besides.

    Outputs and gradients are the same to the bit. Returns: how many there are.
    """
    from diffusers.models.activations import GEGLU

    kind = _gated_kind(GEGLU)
    found = [module for module in model.modules() if type(module) is GEGLU]
    for module in found:
        module.__class__ = kind
    return len(found)


def _gated_kind(kind: type[nn.Module]) -> type[nn.Module]:
    class Gated(kind):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return super().forward(hidden_states, *args, **kwargs)
            return _Gated.apply(self.proj(hidden_states))

    Gated.__name__ = kind.__name__  # networks choose layers by the names of classes
    return Gated


class _Gated(torch.autograd.Function):
    """``y = a GELU(b)`` with (a, b) the halves of the last axis of x; the backward pass computes GELU(b) again.

    x is (..., 2 D), y is (..., D). ``da = dy GELU(b)`` and ``db = dy a GELU'(b)``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        value, gate = ctx.saved_tensors[0].chunk(2, dim=-1)
        of_gate = torch.ops.aten.gelu_backward(gradient * value, gate)
        return torch.cat([gradient * F.gelu(gate), of_gate], dim=-1)
