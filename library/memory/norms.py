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
