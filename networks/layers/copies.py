"""Copies of trained weights, and of inputs, in the dtype of a computation: made once where autocast makes many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from networks.layer import AdapterLayer

_KEPT = "_copy_in_dtype"  # the attribute of a tensor that holds its copy


@contextmanager
def weights_in(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within it, the layers of a network use copies of their weights in `dtype`, which are made and cast together.

    It is for the forward and backward pass of one batch: gradients reach the weights at the end of the backward pass,
    when those of all copies are there.
    """
    layers, weights, pieces = [], [], []
    for layer in network.modules():
        parts = layer.copied_weights() if isinstance(layer, AdapterLayer) else []
        # Sharded weights, which have a mesh of devices, are gathered and cast by what shards them.
        if parts and all(weight.dtype != dtype and not hasattr(weight, "device_mesh") for weight, _ in parts):
            layers.append((layer, sum(len(rows) for _, rows in parts)))
            for weight, rows in parts:
                weights.append(weight)
                pieces.append(rows)
    if not layers:
        yield
        return
    copies = iter(_Copies.apply(dtype, pieces, *weights))
    try:
        for layer, count in layers:
            layer.copies = tuple(next(copies) for _ in range(count))
        del copies
        yield
    finally:
        for layer, _ in layers:
            layer.copies = None


class _Copies(torch.autograd.Function):
    """Weights in another dtype, cut by rows: one operation there, and one for all gradients back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, pieces: Sequence[Sequence[int]], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.pieces, ctx.like = pieces, weights
        parts = [part for weight, rows in zip(weights, pieces, strict=True) for part in _cut(weight, rows)]
        copies = [torch.empty_like(part, dtype=dtype) for part in parts]
        torch._foreach_copy_(copies, parts)
        trained = [weight.requires_grad for weight, rows in zip(weights, pieces, strict=True) for _ in rows]
        ctx.mark_non_differentiable(*(copy for copy, learns in zip(copies, trained, strict=True) if not learns))
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Any, ...]:
        gradients: list[Tensor | None] = []
        own, of_copies, lacking = [], [], []
        left = iter(given)
        for weight, rows in zip(ctx.like, ctx.pieces, strict=True):
            mine = [next(left) for _ in rows]
            if all(one is None for one in mine):  # the layer was not called
                gradients.append(None)
                continue
            gradients.append(torch.empty_like(weight))
            for part, one in zip(_cut(gradients[-1], rows), mine, strict=True):
                if one is None:
                    lacking.append(part)
                else:
                    own.append(part)
                    of_copies.append(one)
        if lacking:
            torch._foreach_zero_(lacking)
        torch._foreach_copy_(own, of_copies)
        del own, of_copies, lacking
        return None, None, *gradients


def _cut(weight: Tensor, rows: Sequence[int]) -> Sequence[Tensor]:
    return weight.split(list(rows)) if len(rows) > 1 else (weight,)


def cast_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, made once while `x` lives and is not changed, as several layers take one input."""
    if x.dtype == dtype:
        return x
    if torch.compiler.is_compiling() or x.is_inference() or (x.is_leaf and x.requires_grad):
        return x.to(dtype)  # a leaf would be held by what its copy came from, for ever
    key = x._version, dtype, torch.is_grad_enabled()
    kept = getattr(x, _KEPT, None)
    if kept is None or kept[0] != key:
        kept = key, x.to(dtype)
        setattr(x, _KEPT, kept)
    return kept[1]


def cast_input(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook: under autocast, casts the input as the module would, for it and all that follow."""
    x = args[0]
    if torch.compiler.is_compiling() or x.dtype != torch.float32 or not torch.is_autocast_enabled(x.device.type):
        return None
    return cast_once(x, torch.get_autocast_dtype(x.device.type)), *args[1:]
