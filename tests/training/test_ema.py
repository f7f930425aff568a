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
    assert not found.requires_grad
    assert np.allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (1, 2 / 11), (8, 0.5), (71, 8 / 9), (100, 0.9), (10**6, 0.9)])
def test_the_warm_up(step, decay):
    """(1 + step) / (10 + step) until that reaches the decay: an average of 1 that sees a 0 becomes the decay itself."""
    parameter = nn.Parameter(torch.ones(1))
    average = EMA([parameter], 0.9)
    parameter.data.zero_()
    average.update(step)
    assert average.state_dict()["0"].item() == pytest.approx(decay, rel=1e-6)


@pytest.mark.parametrize(("sizes", "runs"), [((6, 2, 9, 3, 5, 9, 1), [8, 9, 8, 9, 1]), ((9, 1), [9, 1])])
def test_narrow_weights_are_widened_a_few_at_a_time(monkeypatch, sizes, runs):
    """Float32 copies of all weights of a model in bf16 would take twice the room of the model."""
    parameters = [nn.Parameter(torch.full((size,), 2.0, dtype=torch.bfloat16)) for size in sizes]
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
    assert together == runs
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


def test_a_state_is_taken_over_if_it_fits_and_forgotten_by_a_restart():
    parameters = [nn.Parameter(torch.full((size,), float(size))) for size in (1, 2)]
    average = EMA(parameters, 0.5)
    average.load_state_dict({"0": torch.tensor([7.0]), "1": torch.tensor([8.0, 9.0])})
    assert [value.tolist() for value in average.state_dict().values()] == [[7.0], [8.0, 9.0]]
    with pytest.raises(ValueError, match=r"average 1 has the shape \[3\]"):
        average.load_state_dict({"0": torch.zeros(1), "1": torch.zeros(3)})
    average.restart()
    assert [value.tolist() for value in average.state_dict().values()] == [[1.0], [2.0, 2.0]]
