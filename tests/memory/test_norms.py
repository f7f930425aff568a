"""Norms that keep less give what they gave, and their gradients."""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle, RMSNorm
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from library.memory.norms import keep_dtype, keep_inputs_only, keep_narrow_inputs, keep_no_normed

NORMS = {
    "torch's": lambda: nn.RMSNorm(16, eps=1e-6),
    "torch's, own eps": lambda: nn.RMSNorm(16),
    "torch's, no weight": lambda: nn.RMSNorm(16, eps=1e-6, elementwise_affine=False),
    "diffusers'": lambda: RMSNorm(16, eps=1e-6),
    "diffusers', no weight": lambda: RMSNorm(16, eps=1e-6, elementwise_affine=False),
}


def pair(make, dtype=torch.float32):
    """A norm with drawn weights, and one like it that keeps its input only."""
    plain = nn.Sequential(make()).to(dtype)
    rng = torch.Generator().manual_seed(1)
    for weight in plain.parameters():
        weight.data.copy_(torch.randn(weight.shape, generator=rng))
    lean = copy.deepcopy(plain)
    assert keep_inputs_only(lean) == 1
    return plain, lean


def passes(norm, dtype, x_dtype=None):
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)).to(x_dtype or dtype).requires_grad_()
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor):
        output = norm(x)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    (output * weights.to(output.dtype)).sum().backward()
    return output.detach(), [x.grad, *(weight.grad for weight in norm.parameters())], sum(kept)


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_rms_norms_are_exact(make):
    """Outputs to the bit; gradients to float64's rounding over 16 numbers, and to float32's."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        plain, lean = pair(make, dtype)
        if dtype == torch.float64 and type(plain[0]) is RMSNorm:
            continue  # diffusers rounds to float32 inside
        (expected, gradients, _), (found, own, _) = passes(plain, dtype), passes(lean, dtype)
        assert torch.equal(found, expected)
        for one, other in zip(own, gradients, strict=True):
            assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_in_bf16_they_are_no_further_from_float32_and_keep_less(make):
    plain, lean = pair(make, torch.bfloat16)
    x_dtype = torch.bfloat16
    exact, exact_gradients, _ = passes(copy.deepcopy(plain).float(), torch.float32)
    del exact
    (expected, gradients, most), (found, own, kept) = passes(plain, x_dtype), passes(lean, x_dtype)
    assert torch.equal(found, expected)
    assert kept <= 2 * 3 * 16 * 2 + 16 * 2 < most  # the input and the weight

    def off(values):
        return sum((one.float() - other).norm().item() for one, other in zip(values, exact_gradients, strict=True))

    assert off(own) <= 1.05 * off(gradients)  # the input of the exact one is not rounded, which both bear


def test_layer_norms_answer_in_the_dtype_of_their_input():
    """As on CUDA, where autocast computes them in float32 and gives that."""
    real = F.layer_norm

    def as_on_cuda(x, *args, **kwargs):
        return real(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

    plain = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm(8))
    kept = copy.deepcopy(plain)
    assert keep_dtype(kept) == 1  # what has weights stays
    x = torch.randn(3, 8).bfloat16()
    with mock.patch.object(F, "layer_norm", as_on_cuda), torch.autocast("cpu", torch.bfloat16):
        assert plain[0](x).dtype == torch.float32
        assert kept[0](x).dtype == torch.bfloat16
        assert torch.equal(kept[0](x), plain[0](x).bfloat16())
        assert kept[0](x.float()).dtype == torch.float32
        assert kept[1](x).dtype == torch.float32


def modulated(norm, dtype):
    """Outputs and gradients, and the bytes that are kept between."""
    x = torch.randn(2, 500, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    emb = torch.randn(2, 16, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    kept = {}
    with saved_tensors_hooks(lambda one: kept.setdefault(one.data_ptr(), one.nbytes) and one, lambda one: one):
        output, *others = norm(x, emb=emb)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    ((output * weights).sum() + sum(one.sum() for one in others)).backward()
    return [output.detach(), *others, x.grad, emb.grad, norm.linear.weight.grad], sum(kept.values())


@pytest.mark.parametrize("kind", [AdaLayerNormZero, AdaLayerNormZeroSingle])
def test_modulated_norms_are_exact_and_keep_their_input(kind):
    torch.manual_seed(0)
    plain = kind(16).double()
    lean = copy.deepcopy(plain)
    assert keep_dtype(lean) == keep_no_normed(lean) == 1
    (expected, most), (found, least) = modulated(plain, torch.float64), modulated(lean, torch.float64)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()
    assert least <= most - 2 * 500 * 16 * 8


@pytest.mark.parametrize("kind", [AdaLayerNormZero, AdaLayerNormZeroSingle])
def test_modulated_norms_in_bf16_are_as_near_to_float32_as_unrounded_norms(kind):
    torch.manual_seed(0)
    exact = kind(16).bfloat16()
    rounded, lean = copy.deepcopy(exact), copy.deepcopy(exact)
    keep_dtype(lean)
    assert keep_no_normed(lean) == 1
    expected, _ = modulated(exact.double(), torch.float64)
    (plain, _), (found, _) = modulated(rounded, torch.bfloat16), modulated(lean, torch.bfloat16)
    assert found[0].dtype == torch.bfloat16

    def off(values):
        return [((one.double() - own).norm() / own.norm()).item() for one, own in zip(values, expected, strict=True)]

    assert off(found)[0] < 0.9 * off(plain)[0]  # rounded once, and not thrice
    assert sum(off(found)) <= 1.02 * sum(off(plain))


class GroupNormed(nn.Sequential):
    """As in a residual block."""

    shape = 2, 16, 6, 5

    def __init__(self):
        super().__init__(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 8, 3))


class LayerNormed(nn.Sequential):
    shape = 2, 7, 16

    def __init__(self):
        super().__init__(BasicTransformerBlock(16, 2, 8))


@contextmanager
def autocast_of_cuda():
    """On CUDA autocast computes norms in float32 and gives that; on a CPU it lets them be."""

    def in_float32(norm):
        def compute(x, *args, **kwargs):
            cast = [one.float() if isinstance(one, torch.Tensor) else one for one in (x, *args)]
            with torch.autocast("cpu", enabled=False):
                return norm(*cast, **kwargs)

        return compute

    with ExitStack() as stack:
        for name in ("layer_norm", "group_norm"):
            stack.enter_context(mock.patch.object(F, name, in_float32(getattr(F, name))))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        yield


def narrow(model, dtype):
    """Output and gradients under CUDA's autocast of bf16, and the bytes of float32 tensors that are kept between."""
    x = torch.randn(model.shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    kept = {}

    def keep(tensor):
        if tensor.dtype == torch.float32 and tensor.numel() >= x.numel():
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with autocast_of_cuda(), saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(x)
    output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype))
    return [output.detach(), x.grad, *(one.grad for one in model.parameters())], sum(kept.values())


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "norms"), [(GroupNormed, 1), (LayerNormed, 2)])
def test_norms_with_weights_keep_their_narrow_input_under_autocast(kind, norms, trained):
    """Outputs to the bit. Gradients of queries, keys and values are added up in bf16 before the layer norm."""
    torch.manual_seed(0)
    plain = kind().to(trained)
    with torch.no_grad():
        for weight in plain.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    lean, exact = copy.deepcopy(plain), copy.deepcopy(plain).float()
    assert keep_narrow_inputs(lean) == norms
    (expected, most), (found, least) = narrow(plain, torch.bfloat16), narrow(lean, torch.bfloat16)
    assert torch.equal(found[0], expected[0])
    assert [one.dtype for one in found] == [one.dtype for one in expected]
    assert most - least == norms * math.prod(kind.shape) * 4

    x = torch.randn(kind.shape, generator=torch.Generator().manual_seed(1)).bfloat16().float().requires_grad_()
    output = exact(x)
    output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape).bfloat16().float())
    gradients = [x.grad, *(one.grad for one in exact.parameters())]

    def off(values):
        pairs = zip(values[1:], gradients, strict=True)
        return [((one.float() - other).norm() / other.norm().clamp(min=1e-6)).item() for one, other in pairs]

    assert sum(off(found)) <= 1.1 * sum(off(expected))


@pytest.mark.parametrize("kind", [GroupNormed, LayerNormed])
def test_norms_of_a_wide_input_and_without_autocast_are_torchs(kind):
    torch.manual_seed(0)
    plain = kind()
    lean = copy.deepcopy(plain)
    keep_narrow_inputs(lean)
    x = torch.randn(kind.shape)
    assert torch.equal(plain(x), lean(x))
    (expected, most), (found, least) = narrow(plain, torch.float32), narrow(lean, torch.float32)
    assert most == least
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
