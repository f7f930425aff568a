"""Activations that keep less give what they gave, and their gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from library.memory.activations import keep_gates_only


def passes(model, dtype):
    """Outputs and gradients, and the bytes that are kept between."""
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(x)
    output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape).to(dtype))
    return [output.detach(), x.grad, *(one.grad for one in model.parameters())], sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_layers_are_exact_and_keep_less(dtype):
    torch.manual_seed(0)
    plain = nn.Sequential(GEGLU(16, 32), nn.Linear(32, 16)).to(dtype)
    lean = copy.deepcopy(plain)
    assert keep_gates_only(lean) == 1
    assert type(lean[0]).__name__ == "GEGLU"
    (expected, most), (found, least) = passes(plain, dtype), passes(lean, dtype)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert most - least == 2 * 5 * 32 * dtype.itemsize  # the gate's GELU
