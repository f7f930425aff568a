"""The average of the trained weights, against the formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from library.training.ema import EMA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula(dtype):
    torch.manual_seed(1)
    parameter = nn.Parameter(torch.randn(5, dtype=dtype))
    average = EMA([parameter], 0.99)
    expected = parameter.detach().double().numpy().copy()
    for step in range(1, 200):
        with torch.no_grad():
            parameter.add_(torch.randn(5, dtype=dtype))
        average.update(step)
        decay = min(0.99, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach().double().numpy()
    (found,) = average.state_dict().values()
    assert found.dtype == torch.float32
    assert np.allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_narrow_weights_are_widened_a_few_at_a_time(monkeypatch):
    """Float32 copies of all weights of a model in bf16 would take twice the room of the model."""
    parameters = [nn.Parameter(torch.full((size,), 2.0, dtype=torch.bfloat16)) for size in (6, 2, 3, 9, 1)]
    average, together = EMA(parameters, 0.5, most=8), []
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(4.0)
    lerp = torch._foreach_lerp_

    def note(averages, wide, weight):
        together.append(sum(tensor.numel() for tensor in wide))
        lerp(averages, wide, weight)

    monkeypatch.setattr(torch, "_foreach_lerp_", note)
    average.update(100)
    assert together == [8, 3, 9, 1]
    assert {float(value) for tensor in average.state_dict().values() for value in tensor} == {3.0}


def test_the_average_is_in_place_for_a_while_only():
    parameter = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    average = EMA([parameter], 0.5)
    with torch.no_grad():
        parameter.fill_(8.0)
    with average.in_place():
        assert parameter.tolist() == [1.0, 2.0]
    assert parameter.tolist() == [8.0, 8.0]
    with pytest.raises(RuntimeError), average.in_place():
        raise RuntimeError
    assert parameter.tolist() == [8.0, 8.0]
