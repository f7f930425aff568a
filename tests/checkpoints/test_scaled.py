"""Weights of 8 bits with scales. Reference: the product, number by number."""

from __future__ import annotations

import pytest
import torch

from library.checkpoints.scaled import is_scale, multiplied, scale_of
from library.errors import UserError


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4,), (4, 1), (4, 3), (4, 3, 1)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_product(shape, dtype):
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    found = multiplied("a.weight", weight, scale)
    blocks = scale.reshape(-1) if scale.numel() == 1 else scale.reshape(4, -1)
    for row in range(4):
        for column in range(6):
            factor = blocks[0] if scale.numel() == 1 else blocks[row, column // (6 // blocks.shape[1])]
            assert found[row, column] == weight[row, column].float() * factor
    assert found.dtype == torch.float32


@pytest.mark.parametrize("shape", [(3,), (6,), (4, 4), (2, 2), (4, 1, 1, 1)])
def test_scales_that_do_not_fit(shape):
    with pytest.raises(UserError, match=r"a\.weight: scales of shape .* do not fit weights \(4, 6\)"):
        multiplied("a.weight", torch.zeros(4, 6).to(torch.float8_e4m3fn), torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bfloat16])
def test_other_formats_are_named(dtype):
    with pytest.raises(UserError, match=f"a.weight: weights in {str(dtype).removeprefix('torch.')} with separate"):
        multiplied("a.weight", torch.zeros(4, 6).to(dtype), torch.ones(()))


def test_names():
    keys = {"a.weight", "a.scale_weight", "b.weight", "b.weight_scale", "c.weight", "c.bias", "a.bias"}
    found = {key: scale_of(key, keys) for key in sorted(keys)}
    assert {key: scale for key, scale in found.items() if scale} == {
        "a.weight": "a.scale_weight",
        "b.weight": "b.weight_scale",
    }
    scales = ("a.scale_weight", "a.input_scale", "x.scaled_fp8", "scaled_fp8", "a.comfy_quant")
    assert all(is_scale(key) for key in scales)
    assert not any(is_scale(key) for key in ("a.weight", "norm.query_norm.scale", "logit_scale", "a.scale_shift_table"))
