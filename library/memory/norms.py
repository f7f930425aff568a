"""Norms that keep less for the backward pass, and give the dtype they are given where autocast would give float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_HAS_KERNEL = hasattr(torch.ops.aten, "_fused_rms_norm")  # on CUDA, since torch 2.9


def keep_dtype(model: nn.Module) -> int:
    """Lets layer norms without weights answer in the dtype of their input, under autocast too.

    On CUDA autocast makes their outputs float32: twice the memory, and a cast for each layer that takes them. Inside,
    sums are float32 either way; what changes is that the result is rounded before it is modulated, as it is in code
    that runs without autocast.

    Returns: how many there are.
    """
    return _become(model, nn.LayerNorm, _LayerNorm, lambda module: module.weight is None)


def keep_inputs_only(model: nn.Module) -> int:
    """Lets RMS norms keep their inputs for the backward pass, and not float32 copies of them and of what follows.

    Outputs are the same to the bit. Returns: how many there are.
    """
    from diffusers.models.normalization import RMSNorm

    def over_last_axis(module: nn.Module) -> bool:
        return len(module.normalized_shape) == 1

    def without_bias(module: nn.Module) -> bool:
        return module.bias is None and len(module.dim) == 1

    kinds = (nn.RMSNorm, _RmsNorm, over_last_axis), (RMSNorm, _diffusers_kind(RMSNorm), without_bias)
    return sum(_become(model, *kind) for kind in kinds)


def keep_no_normed(model: nn.Module) -> int:
    """Lets norms that are modulated at once keep their input, and not what is between the norm and the modulation.

    It is for norms of which `keep_dtype` has changed the inner one. Outputs have the input's dtype, rounded once.

    Returns: how many there are.
    """
    from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle

    def has_own_norm(module: nn.Module) -> bool:
        return type(module.norm) is _LayerNorm and getattr(module, "emb", None) is None

    kinds = (AdaLayerNormZero, 6), (AdaLayerNormZeroSingle, 3)
    return sum(_become(model, kind, _modulating_kind(kind, count), has_own_norm) for kind, count in kinds)


def keep_narrow_inputs(model: nn.Module) -> int:
    """Lets norms with weights keep their input for the backward pass, and not the float32 copy that autocast makes.

    Those are the group norms, which answer in float32 as before, and the layer norms in the blocks of transformers,
    which answer in the dtype of their input: the linear layers that take their results round them to it anyway. Outputs
    of the layers that follow are the same to the bit.

    Returns: how many there are.
    """
    from diffusers.models.attention import BasicTransformerBlock

    blocks = [module for module in model.modules() if type(module) is BasicTransformerBlock]
    layer_norms = sum(_become(block, nn.LayerNorm, _WeightedLayerNorm, _has_both) for block in blocks)
    return layer_norms + _become(model, nn.GroupNorm, _GroupNorm, _has_both)


def _has_both(module: nn.Module) -> bool:
    return module.weight is not None and module.bias is not None


def _become(model: nn.Module, kind: type, own: type, wanted: Any) -> int:
    found = [module for module in model.modules() if type(module) is kind and wanted(module)]
    for module in found:
        module.__class__ = own
    return len(found)


class _LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, None, None, self.eps)


class _RmsNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or (x.is_cuda and _HAS_KERNEL):
            return super().forward(x)
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if self.eps is None else self.eps
        return _Recomputed.apply(x, self.weight, eps, super().forward)


class _WeightedLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        if _keeps_a_copy(x):
            return _LayerNormInFloat32.apply(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class _GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        if _keeps_a_copy(x):
            return _GroupNormInFloat32.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x)


def _keeps_a_copy(x: Tensor) -> bool:
    """Whether autocast would hand a norm a float32 copy of `x`, which the backward pass would keep."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return torch.is_autocast_enabled(x.device.type) and x.dtype.itemsize < 4


def _diffusers_kind(kind: type[nn.Module]) -> type[nn.Module]:
    class DiffusersRmsNorm(kind):
        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return super().forward(x)
            return _Recomputed.apply(x, self.weight, self.eps, super().forward)

    return DiffusersRmsNorm


def _modulating_kind(kind: type[nn.Module], count: int) -> type[nn.Module]:
    """`kind`, whose linear layer gives shift, scale and other vectors, `count` of them."""

    class Modulating(kind):
        def forward(self, x: Tensor, *args: Any, emb: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, ...]:
            if emb is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return super().forward(x, *args, **kwargs, emb=emb)
            shift, scale, *others = self.linear(self.silu(emb)).chunk(count, dim=1)
            return _Modulated.apply(x, scale[:, None], shift[:, None], self.norm.eps), *others

    return Modulating


class _Modulated(torch.autograd.Function):
    """``y = n (1 + scale) + shift`` with n the layer norm of x, which the backward pass computes again.

    All of it is float32 inside, and rounded once, as where autocast makes n float32 and the next layer casts y.
    x is (B, L, D), scale and shift are (B, 1, D). ``dscale = sum(dy n)`` and ``dshift = sum(dy)`` over L.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.eps, ctx.shift_dtype = eps, shift.dtype
        with torch.autocast(x.device.type, enabled=False):
            normed = torch.native_layer_norm(_wide(x), x.shape[-1:], None, None, eps)[0]
            return normed.mul_(1 + scale).add_(shift).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        of_x = of_scale = of_shift = None
        gradient, wide, shape = _wide(gradient), _wide(x), x.shape[-1:]
        normed, mean, rstd = torch.native_layer_norm(wide, shape, None, None, ctx.eps)
        if ctx.needs_input_grad[1]:
            of_scale = normed.mul_(gradient).sum(1, keepdim=True).to(scale.dtype)
        if ctx.needs_input_grad[2]:
            of_shift = gradient.sum(1, keepdim=True).to(ctx.shift_dtype)
        if ctx.needs_input_grad[0]:
            inner, wanted = gradient * (1 + scale), [True, False, False]
            of_x = torch.ops.aten.native_layer_norm_backward(inner, wide, shape, mean, rstd, None, None, wanted)[0]
            of_x = of_x.to(x.dtype)
        return of_x, of_scale, of_shift, None


class _LayerNormInFloat32(torch.autograd.Function):
    """A layer norm over the last axis, computed in float32 and rounded to the dtype of x, which is what is kept.

    x is (..., D), weight and bias are (D,). Kept besides: mean and ``1 / sqrt(var + eps)`` of each row, in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.dtypes = weight.dtype, bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = _wide(weight), _wide(bias)
            normed, mean, rstd = torch.native_layer_norm(_wide(x), weight.shape, weight, bias, eps)
            ctx.save_for_backward(x, weight, bias, mean, rstd)
            return normed.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        gradients = torch.ops.aten.native_layer_norm_backward(
            _wide(gradient), _wide(x), weight.shape, mean, rstd, weight, bias, list(ctx.needs_input_grad[:3])
        )
        return *_rounded(gradients, x.dtype, *ctx.dtypes), None


class _GroupNormInFloat32(torch.autograd.Function):
    """A group norm, computed in float32, as is what it returns; x is kept in its own dtype.

    x is (B, C, ...), weight and bias are (C,). Kept besides, in float32: each group's mean and ``1 / sqrt(var + eps)``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        ctx.dtypes, ctx.groups = (weight.dtype, bias.dtype), groups
        size = len(x), x.shape[1], x[0, 0].numel()
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = _wide(weight), _wide(bias)
            normed, mean, rstd = torch.native_group_norm(_wide(x).contiguous(), weight, bias, *size, groups, eps)
            ctx.save_for_backward(x, weight, mean, rstd)
            return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        size = len(x), x.shape[1], x[0, 0].numel()
        gradients = torch.ops.aten.native_group_norm_backward(
            gradient.contiguous(),
            _wide(x).contiguous(),
            mean,
            rstd,
            weight,
            *size,
            ctx.groups,
            list(ctx.needs_input_grad[:3]),
        )
        return *_rounded(gradients, x.dtype, *ctx.dtypes), None, None


def _rounded(gradients: tuple[Tensor | None, ...], *dtypes: torch.dtype) -> list[Tensor | None]:
    return [None if one is None else one.to(dtype) for one, dtype in zip(gradients, dtypes, strict=True)]


def _wide(tensor: Tensor) -> Tensor:
    """In float32, if it has fewer bits."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


class _Recomputed(torch.autograd.Function):
    """``y = w x r`` with ``r = 1 / sqrt(mean(x^2) + eps)`` over the last axis; the backward pass computes r again.

    Its gradients, with ``h = x r`` and ``k = w dy``: ``dx = r (k - h mean(k h))``, ``dw = sum(dy h)``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, compute: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return compute(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide = _wide(x)
        r = (wide.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        h, k = wide * r, gradient.to(wide.dtype)
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (k * h).flatten(0, -2).sum(0).to(weight.dtype)
        if weight is not None:
            k = k * weight
        of_x = torch.addcmul(k, h, (k * h).mean(-1, keepdim=True), value=-1).mul_(r).to(x.dtype)
        return of_x, of_weight, None, None
