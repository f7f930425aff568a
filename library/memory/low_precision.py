"""Frozen weights kept small. Here: in 8-bit floats, a quarter of float32's memory, half of bf16's.

A layer stays the object that it was, with its hooks and its place in the model; only its class and how it keeps its
weight change. The computation is in the layer's input format, or autocast's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.version import NAME

FORMAT = torch.float8_e4m3fn
_LARGEST = torch.finfo(FORMAT).max  # 448
_LEAST_EXPONENT = -14  # of a scale: the smallest that fp16 holds in full


Pack = Callable[[Tensor], tuple[Tensor, Tensor]]  # weight -> bits and scale, which `Module.to(dtype)` does not harm
Widen = Callable[[Tensor, Tensor, torch.Size, torch.dtype], Tensor]  # bits, scale, shape and format -> weight

_CLOSED: dict[Widen, Widen] = {}  # the same as operations that a compiler does not look into


def widening(name: str) -> Callable[[Widen], Widen]:
    """Marks a function as the `widen` of a kind of layer. `name`: one of its own, for the compiler."""

    def mark(widen: Widen) -> Widen:
        def run(bits: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            return widen(bits, scale, torch.Size(shape), dtype)

        schema = "(Tensor bits, Tensor scale, SymInt[] shape, ScalarType dtype) -> Tensor"
        closed = torch.library.custom_op(f"{NAME}::widen_{name}", run, mutates_args=(), schema=schema)
        closed.register_fake(lambda bits, scale, shape, dtype: bits.new_empty(shape, dtype=dtype))
        _CLOSED[widen] = closed
        return widen

    return mark


def keep_in_fp8(part: nn.Module) -> int:
    """Turns every frozen linear layer and 2D convolution inside `part` into one whose weight is kept in 8 bits.

    Weights are off by at most 1/16 of themselves, or 1/1024 of the tensor's scale where that is more; the scale is at
    most 1/224 of the largest weight, or 2**-14. Biases, norms and embeddings stay as they are.

    Returns: how many layers were turned.
    Raises: ValueError: a weight is being trained.
    """
    return keep_small(part, to_fp8, {nn.Linear: Fp8Linear, nn.Conv2d: Fp8Conv2d})


def keep_small(part: nn.Module, pack: Pack, kinds: Mapping[type, type[SmallWeight]]) -> int:
    """Gives the layers inside `part` the class that `kinds` has for theirs, and what `pack` makes of their weight.

    Subclasses of linear layers and convolutions stay as they are, and so do convolutions that pad otherwise than by
    a number of zeros.

    Returns: how many layers were turned.
    Raises: ValueError: a weight is being trained.
    """
    turned = 0
    for module in part.modules():
        kind = kinds.get(type(module))
        if kind is None or (isinstance(module, nn.Conv2d) and not _plain(module)):
            continue
        if module.weight.requires_grad:
            raise ValueError("weights that are kept small cannot be trained")
        with torch.no_grad():
            bits, scale = pack(module.weight)
        del module.weight
        module.register_buffer("weight_bits", bits, persistent=False)
        module.register_buffer("weight_scale", scale, persistent=False)
        module.__class__ = kind
        turned += 1
    return turned


def _widen_again(widen: Widen, bits: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """In the backward pass. A compiler that saw the same operations twice would keep the wide weight in between."""
    return (_CLOSED[widen] if torch.compiler.is_compiling() else widen)(bits, scale, shape, dtype)


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


@widening("fp8")
def _widen_fp8(bits: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return from_fp8(bits, scale, dtype)


class SmallWeight:
    """What layers have in common that hold `weight_bits` and `weight_scale` in place of a weight."""

    widen: ClassVar[Widen]  # marked by `widening`
    weight_bits: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None

    @property
    def weight_shape(self) -> torch.Size:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """A copy in the bias's format, or float32; frozen."""
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        return self.widen(self.weight_bits, self.weight_scale, self.weight_shape, dtype)


class SmallLinear(SmallWeight, nn.Linear):
    @property
    def weight_shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        dtype = _computing(x)
        kept = self.weight_bits, self.weight_scale, self.widen, self.weight_shape
        return _Linear.apply(x.to(dtype), *kept, _cast(self.bias, dtype))


class SmallConv2d(SmallWeight, nn.Conv2d):
    @property
    def weight_shape(self) -> torch.Size:
        return torch.Size((self.out_channels, self.in_channels // self.groups, *self.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        dtype = _computing(x)
        kept = self.weight_bits, self.weight_scale, self.widen, self.weight_shape
        geometry = self.stride, self.padding, self.dilation, self.groups
        return _Conv2d.apply(x.to(dtype), *kept, _cast(self.bias, dtype), *geometry)


class Fp8Linear(SmallLinear):
    widen = staticmethod(_widen_fp8)


class Fp8Conv2d(SmallConv2d):
    widen = staticmethod(_widen_fp8)


class _Linear(torch.autograd.Function):
    """Keeps the small weight for the backward pass instead of the wide one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bits: Tensor, scale: Tensor, widen: Widen, shape: torch.Size, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(bits, scale)
        ctx.widen, ctx.shape = widen, shape
        return F.linear(x, widen(bits, scale, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        bits, scale = ctx.saved_tensors
        return gradient @ _widen_again(ctx.widen, bits, scale, ctx.shape, gradient.dtype), *[None] * 5


class _Conv2d(torch.autograd.Function):
    """Likewise."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bits: Tensor, scale: Tensor, widen: Widen, shape: torch.Size, bias: Tensor | None,
        stride, padding, dilation, groups,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(bits, scale)
        ctx.widen, ctx.shape = widen, shape
        ctx.input, ctx.geometry = x.shape, (stride, padding, dilation, groups)
        return F.conv2d(x, widen(bits, scale, shape, x.dtype), bias, *ctx.geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        bits, scale = ctx.saved_tensors
        weight = _widen_again(ctx.widen, bits, scale, ctx.shape, gradient.dtype)
        return nn.grad.conv2d_input(ctx.input, weight, gradient, *ctx.geometry), *[None] * 9


def _plain(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _computing(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)
