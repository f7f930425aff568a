"""Frozen weights kept in 8-bit floats: a quarter of float32's memory, half of bf16's.

A layer stays the object that it was, with its hooks and its place in the model; only its class and how it keeps its
weight change. The computation is in the layer's input format, or autocast's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FORMAT = torch.float8_e4m3fn
_LARGEST = torch.finfo(FORMAT).max  # 448
_LEAST_EXPONENT = -14  # of a scale: the smallest that fp16 holds in full


def keep_in_fp8(part: nn.Module) -> int:
    """Turns every frozen linear layer and 2D convolution inside `part` into one whose weight is kept in 8 bits.

    Weights are off by at most 1/16 of themselves, or 1/1024 of the tensor's scale where that is more; the scale is at
    most 1/224 of the largest weight, or 2**-14. Biases, norms and embeddings stay as they are.

    Returns: how many layers were turned.
    Raises: ValueError: a weight is being trained.
    """
    turned = 0
    for module in part.modules():
        kind = _KINDS.get(type(module))
        if kind is None or (isinstance(module, nn.Conv2d) and not _plain(module)):
            continue
        if module.weight.requires_grad:
            raise ValueError("weights in 8-bit floats cannot be trained")
        bits, scale = to_fp8(module.weight)
        del module.weight
        module.register_buffer("weight_bits", bits, persistent=False)
        module.register_buffer("weight_scale", scale, persistent=False)
        module.__class__ = kind
        turned += 1
    return turned


@torch.no_grad()
def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(bits, scale): float8 as uint8, which `Module.to(dtype)` leaves alone, and a power of two as float32, ().

    The scale is a power of two so that taking it back is exact in every format.
    """
    _, exponent = torch.frexp(weight.abs().max().float() / _LARGEST)
    scale = torch.exp2(exponent.clamp_min(_LEAST_EXPONENT).float())
    return (weight.float() / scale).to(FORMAT).view(torch.uint8), scale


def from_fp8(bits: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_fp8`, in `dtype`."""
    return bits.view(FORMAT).to(dtype) * scale.to(dtype)


class Fp8Linear(nn.Linear):
    @property
    def weight(self) -> Tensor:
        """A copy in the bias's format, or float32; frozen."""
        return from_fp8(self.weight_bits, self.weight_scale, _format_of(self))

    def forward(self, x: Tensor) -> Tensor:
        dtype = _computing(x)
        return _Linear.apply(x.to(dtype), self.weight_bits, self.weight_scale, _cast(self.bias, dtype))


class Fp8Conv2d(nn.Conv2d):
    @property
    def weight(self) -> Tensor:
        """A copy in the bias's format, or float32; frozen."""
        return from_fp8(self.weight_bits, self.weight_scale, _format_of(self))

    def forward(self, x: Tensor) -> Tensor:
        dtype = _computing(x)
        bits, scale, bias = self.weight_bits, self.weight_scale, _cast(self.bias, dtype)
        return _Conv2d.apply(x.to(dtype), bits, scale, bias, self.stride, self.padding, self.dilation, self.groups)


class _Linear(torch.autograd.Function):
    """Keeps the 8-bit weight for the backward pass instead of the wide one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(bits, scale)
        return F.linear(x, from_fp8(bits, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        bits, scale = ctx.saved_tensors
        return gradient @ from_fp8(bits, scale, gradient.dtype), None, None, None


class _Conv2d(torch.autograd.Function):
    """Likewise."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None, stride, padding, dilation, groups
    ) -> Tensor:
        ctx.save_for_backward(bits, scale)
        ctx.shape, ctx.geometry = x.shape, (stride, padding, dilation, groups)
        return F.conv2d(x, from_fp8(bits, scale, x.dtype), bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        bits, scale = ctx.saved_tensors
        weight = from_fp8(bits, scale, gradient.dtype)
        return nn.grad.conv2d_input(ctx.shape, weight, gradient, *ctx.geometry), *[None] * 7


_KINDS: dict[type, type] = {nn.Linear: Fp8Linear, nn.Conv2d: Fp8Conv2d}


def _plain(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _computing(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _format_of(layer: Fp8Linear | Fp8Conv2d) -> torch.dtype:
    return torch.float32 if layer.bias is None else layer.bias.dtype
