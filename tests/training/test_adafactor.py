"""AdaFactor over many weights at once gives the bits that transformers' own step gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from library.runtime import seeds
from library.training import adafactor
from library.training.precision import StochasticRounding, round_stochastically
from library.training.stepping import FusedGroups, chunks_by_block

SHAPES = [(6, 5), (6, 5), (5,), (5,), (), (7, 3), (4, 3, 3, 3), (4, 3, 3, 3), (1, 9), (64, 48), (300,), (64, 48)]
SETTINGS = {
    "as guides give it": {"relative_step": False, "warmup_init": False},
    "own rates": {"relative_step": True, "lr": None},
    "own rates, warmed up": {"relative_step": True, "warmup_init": True, "lr": None},
    "momentum and decay": {"relative_step": False, "beta1": 0.9, "weight_decay": 0.01},
}


def made(settings, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for shape in SHAPES]
    groups = [{"params": weights[:4]}, {"params": weights[4:]}]
    return weights, Adafactor(groups, **{"lr": 1e-2, "scale_parameter": False, **settings})


def give_gradients(weights, number):
    rng = torch.Generator().manual_seed(100 + number)
    for position, weight in enumerate(weights):
        scale = 10.0 ** (position % 5 - 3)  # some steps are clipped, some are not
        drawn = torch.randn(weight.shape, generator=rng) * scale
        weight.grad = None if position == number else drawn.to(weight.dtype)  # one weight is left out of each step


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for key, own in expected.items():
        assert found[key].keys() == own.keys()
        for name, value in own.items():
            same = (
                torch.equal(found[key][name], value) if isinstance(value, torch.Tensor) else found[key][name] == value
            )
            assert same, (key, name)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_weights_and_state_have_the_same_bits(settings):
    (weights, own), (expected, theirs) = made(settings), made(settings)
    assert adafactor.steps_together(own)
    for number in range(4):
        for tensors, step in ((weights, lambda: adafactor.step(own)), (expected, theirs.step)):
            give_gradients(tensors, number)
            step()
    assert all(map(torch.equal, weights, expected))
    assert_same_bits(own.state_dict()["state"], theirs.state_dict()["state"])


def test_a_state_of_theirs_is_continued():
    (weights, own), (expected, theirs) = made({"relative_step": False}), made({"relative_step": False})
    give_gradients(expected, 0)
    theirs.step()
    for weight, value in zip(weights, expected, strict=True):
        weight.data.copy_(value.data)
    own.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for tensors, step in ((weights, lambda: adafactor.step(own)), (expected, theirs.step)):
        give_gradients(tensors, 1)
        step()
    assert all(map(torch.equal, weights, expected))


def test_rates_by_size_of_the_weights_stay_theirs():
    _, optimizer = made({"relative_step": False, "scale_parameter": True})
    assert not adafactor.steps_together(optimizer)
    assert not adafactor.steps_together(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1))


def test_half_precision_without_rounding_is_theirs():
    (weights, own), (expected, theirs) = (made({"relative_step": False}, torch.bfloat16) for _ in range(2))
    for tensors, step in ((weights, lambda: adafactor.step(own)), (expected, theirs.step)):
        give_gradients(tensors, 0)
        step()
    assert all(map(torch.equal, weights, expected))


def test_rounding_draws_the_bits_of_each_weight_from_its_own_stream():
    """The bf16 weight is its float32 step, rounded by the stream of (seed, step, number of the weight)."""
    weights, optimizer = made({"relative_step": False}, torch.bfloat16)
    exact = [nn.Parameter(weight.detach().float()) for weight in weights]
    theirs = Adafactor(exact, lr=1e-2, scale_parameter=False, relative_step=False)
    StochasticRounding(optimizer, seed=3)
    give_gradients(weights, 0)
    for weight, copied in zip(weights, exact, strict=True):
        copied.grad = None if weight.grad is None else weight.grad.float()
    adafactor.step(optimizer)
    theirs.step()
    for number, (weight, copied) in enumerate(zip(weights, exact, strict=True)):
        rng = seeds.generator("cpu", 3, "rounding", 0, number)
        rounded = round_stochastically(copied.detach(), rng) if copied.grad is not None else copied.bfloat16()
        assert torch.equal(weight, rounded), number


def test_steps_of_parts_inside_the_backward_pass_have_the_same_bits():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)), nn.Linear(8, 8))
    other = copy.deepcopy(model)
    settings = {"lr": 1e-2, "scale_parameter": False, "relative_step": False}
    own, theirs = Adafactor(model.parameters(), **settings), Adafactor(other.parameters(), **settings)
    parts = chunks_by_block(list(model.parameters()), list(model[:3]), most=70)
    assert [len(part) for part in parts] == [1, 1, 1, 1, 1, 1, 1, 1]
    parts = chunks_by_block(list(model.parameters()), list(model[:3]))
    assert [len(part) for part in parts] == [2, 2, 2, 2]
    groups = FusedGroups(own, parts)
    for number in range(3):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
        model(x).square().mean().backward()
        groups.finish()
        other(x).square().mean().backward()
        theirs.step()
        theirs.zero_grad()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_schedule_does_not_miss_the_steps_of_parts(recwarn):
    """torch's schedules warn where they are stepped and the optimizer, as they see it, was not."""
    layer = nn.Linear(4, 4)
    optimizer = Adafactor(layer.parameters(), lr=1e-2, scale_parameter=False, relative_step=False)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    groups = FusedGroups(optimizer, [list(layer.parameters())])
    layer(torch.ones(1, 4)).sum().backward()
    groups.finish()
    schedule.step()
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]
