"""Quantisation of frozen weights, and its first format: 8-bit floats, a quarter of float32's memory, half of bf16's.

A layer stays the object that it was, with its hooks and its place in the model; only its class and how its weight is
stored change. It computes in the dtype of its input, or in autocast's.
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


Quantise = Callable[[Tensor], tuple[Tensor, Tensor]]  # weight -> bits and scale, which `Module.to(dtype)` does not harm
Dequantise = Callable[[Tensor, Tensor, torch.Size, torch.dtype], Tensor]  # bits, scale, shape and dtype -> weight

_OPAQUE_OPS: dict[Dequantise, Dequantise] = {}  # the same as custom operators, which torch.compile does not trace


def dequantiser(name: str) -> Callable[[Dequantise], Dequantise]:
    """Marks a function as the `dequantise` of a quantised layer. `name`: that of its custom operator."""

    def mark(dequantise: Dequantise) -> Dequantise:
        def run(bits: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            return dequantise(bits, scale, torch.Size(shape), dtype)

        schema = "(Tensor bits, Tensor scale, SymInt[] shape, ScalarType dtype) -> Tensor"
        op = torch.library.custom_op(f"{NAME}::dequantise_{name}", run, mutates_args=(), schema=schema)
        op.register_fake(lambda bits, scale, shape, dtype: bits.new_empty(shape, dtype=dtype))
        _OPAQUE_OPS[dequantise] = op
        return dequantise

    return mark


def quantise_to_fp8(part: nn.Module) -> int:
    """Turns every frozen linear layer and 2D convolution inside `part` into one whose weight is stored in 8 bits.

    Weights are off by at most 1/16 of themselves, or 1/1024 of the tensor's scale where that is more; the scale is at
    most 1/224 of the largest weight, or 2**-14. Biases, norms and embeddings stay as they are.

    Returns: how many layers were quantised.
    Raises: ValueError: a weight is being trained.
    """
    return quantise_frozen(part, to_fp8, {nn.Linear: Fp8Linear, nn.Conv2d: Fp8Conv2d})


def quantise_frozen(part: nn.Module, quantise: Quantise, kinds: Mapping[type, type[QuantisedWeight]]) -> int:
    """Gives the layers inside `part` the class that `kinds` has for theirs, and what `quantise` makes of their weight.

    Subclasses of linear layers and convolutions stay as they are, and so do convolutions that pad otherwise than by
    a number of zeros.

    Returns: how many layers were quantised.
    Raises: ValueError: a weight is being trained.
    """
    quantised = 0
    for module in part.modules():
        kind = kinds.get(type(module))
        if kind is None:
            continue
        if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
            continue
        if module.weight.requires_grad:
            raise ValueError("quantised weights cannot be trained")
        with torch.no_grad():
            bits, scale = quantise(module.weight)
        del module.weight
        module.register_buffer("weight_bits", bits, persistent=False)
        module.register_buffer("weight_scale", scale, persistent=False)
        module.__class__ = kind
        quantised += 1
    return quantised


def _dequantise_again(
    dequantise: Dequantise, bits: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """The weight in the backward pass. A compiler that saw the same operations twice would keep it in between."""
    return (_OPAQUE_OPS[dequantise] if torch.compiler.is_compiling() else dequantise)(bits, scale, shape, dtype)


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


@dequantiser("fp8")
def _dequantise_fp8(bits: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return from_fp8(bits, scale, dtype)


class QuantisedWeight:
    """A layer that holds `weight_bits` and `weight_scale` in place of a weight."""

    dequantise: ClassVar[Dequantise]  # marked by `dequantiser`
    weight_bits: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None

    @property
    def weight_shape(self) -> torch.Size:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dequantised weight, a frozen copy in the dtype of the bias, or in float32."""
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        return self.dequantise(self.weight_bits, self.weight_scale, self.weight_shape, dtype)


class QuantisedLinear(QuantisedWeight, nn.Linear):
    @property
    def weight_shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        dtype = _computing(x)
        kept = self.weight_bits, self.weight_scale, self.dequantise, self.weight_shape
        return _Linear.apply(x.to(dtype), *kept, _cast(self.bias, dtype))


class QuantisedConv2d(QuantisedWeight, nn.Conv2d):
    @property
    def weight_shape(self) -> torch.Size:
        return torch.Size((self.out_channels, self.in_channels // self.groups, *self.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        dtype = _computing(x)
        kept = self.weight_bits, self.weight_scale, self.dequantise, self.weight_shape
        geometry = self.stride, self.padding, self.dilation, self.groups
        return _Conv2d.apply(x.to(dtype), *kept, _cast(self.bias, dtype), *geometry)


class Fp8Linear(QuantisedLinear):
    dequantise = staticmethod(_dequantise_fp8)


class Fp8Conv2d(QuantisedConv2d):
    dequantise = staticmethod(_dequantise_fp8)


class _Linear(torch.autograd.Function):
    """A linear layer that saves the quantised weight for the backward pass, and not the dequantised one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bits: Tensor, scale: Tensor, dequantise: Dequantise, shape: torch.Size, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(bits, scale)
        ctx.dequantise, ctx.shape = dequantise, shape
        return F.linear(x, dequantise(bits, scale, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        bits, scale = ctx.saved_tensors
        return gradient @ _dequantise_again(ctx.dequantise, bits, scale, ctx.shape, gradient.dtype), *[None] * 5


class _Conv2d(torch.autograd.Function):
    """A convolution that saves the quantised weight for the backward pass, and not the dequantised one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bits: Tensor, scale: Tensor, dequantise: Dequantise, shape: torch.Size,
        bias: Tensor | None, stride, padding, dilation, groups,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(bits, scale)
        ctx.dequantise, ctx.shape = dequantise, shape
        ctx.input, ctx.geometry = x.shape, (stride, padding, dilation, groups)
        return F.conv2d(x, dequantise(bits, scale, shape, x.dtype), bias, *ctx.geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        bits, scale = ctx.saved_tensors
        weight = _dequantise_again(ctx.dequantise, bits, scale, ctx.shape, gradient.dtype)
        return nn.grad.conv2d_input(ctx.input, weight, gradient, *ctx.geometry), *[None] * 9


def _computing(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)
