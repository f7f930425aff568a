"""Stepping in parts and inside the backward pass gives what one step after it gives."""

from __future__ import annotations

import copy
import itertools
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.options.memory import MemoryOptions
from library.options.optimizer import TORCH_OPTIMIZERS, OptimizerOptions, steps_each_weight_independently
from library.options.training import TrainingOptions
from library.training.optimizers import make_optimizer
from library.training.stepping import (
    FusedGroups,
    OptimizerStepper,
    equal_parts,
    parts_by_block,
    step_chunked,
    step_in_backward,
    step_subset,
    uses_stochastic_rounding,
)
from tests.builders.options import options_with

NAMES = [*TORCH_OPTIMIZERS, "AdaFactor", "AdaFactor with relative steps"]


class Model(nn.Module):
    """Uses one weight twice, checkpoints a part, and leaves a weight out where told to."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.shared, self.last = (nn.Linear(8, 8, bias=False) for _ in range(3))
            self.sometimes = nn.Linear(8, 8, bias=False)

    def forward(self, x, with_all=True):
        x = checkpoint(lambda given: self.shared(self.first(given).tanh()), x, use_reentrant=False)
        x = self.shared(x).tanh()
        return self.last(self.sometimes(x) if with_all else x)


def optimizer_of(model, name):
    path, _, relative = name.partition(" with ")
    args = ["relative_step=True" if relative else "relative_step=False"] if path == "AdaFactor" else None
    options = OptimizerOptions(optimizer_type=path, learning_rate=1e-2, optimizer_args=args)
    assert steps_each_weight_independently(options)
    weights = list(model.parameters())
    groups = [
        {"params": weights[:2], "lr": 1e-2, "name": "a"},
        {"params": weights[2:], "lr": 1e-2 if relative else 3e-2, "name": "b"},
    ]
    return make_optimizer(groups, options)


def batches(count=3):
    rng = torch.Generator().manual_seed(4)
    return [torch.randn(5, 8, generator=rng) for _ in range(count)]


def train(model, optimizer, step):
    for number, x in enumerate(batches()):
        model(x, with_all=number != 1).square().mean().backward()
        step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def plain(name):
    model = Model()
    optimizer = optimizer_of(model, name)
    return train(model, optimizer, optimizer.step), optimizer.state_dict()


def assert_same(model_weights, optimizer, name):
    expected, state = plain(name)
    torch.testing.assert_close(model_weights, expected, rtol=1e-6, atol=1e-7)
    got = optimizer.state_dict()
    assert got["param_groups"] == state["param_groups"]
    torch.testing.assert_close(got["state"], state["state"], rtol=1e-5, atol=1e-7)


@pytest.mark.rows("R327")
def test_the_oldest_torch_that_is_taken_can_step_inside_the_backward_pass():
    """`Tensor.register_post_accumulate_grad_hook` came with torch 2.1."""
    requirements = Path("requirements/core.txt").read_text(encoding="utf-8")
    (oldest,) = re.findall(r"^torch>=(\d+)\.(\d+)", requirements, flags=re.M)
    assert tuple(map(int, oldest)) >= (2, 1)


@pytest.mark.parametrize("name", NAMES)
def test_steps_inside_the_backward_pass_are_exact(name):
    model = Model()
    optimizer = optimizer_of(model, name)
    step_in_backward(optimizer)
    weights = train(model, optimizer, lambda: None)
    assert_same(weights, optimizer, name)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("most", [1, 64, 128, 10_000])
def test_steps_in_parts_are_exact(name, most):
    model = Model()
    optimizer = optimizer_of(model, name)
    weights = train(model, optimizer, lambda: step_chunked(optimizer, most))
    assert_same(weights, optimizer, name)


def test_gradients_never_live_together():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(6)))
    optimizer = torch.optim.AdamW(model.parameters())
    alive = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    model(torch.randn(2, 8)).sum().backward()
    assert max(alive) == 6
    optimizer.zero_grad()
    alive.clear()
    step_in_backward(optimizer)
    model(torch.randn(2, 8)).sum().backward()
    assert max(alive) == 1


def test_rates_of_a_schedule_and_loaded_groups_are_followed():
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    handles = step_in_backward(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # which makes new groups
    moves = []
    for _ in range(3):
        before = model.weight.detach().clone()
        model(torch.ones(1, 4)).sum().backward()
        moves.append(float((before - model.weight).mean().detach()))
        schedule.step()
    assert moves == pytest.approx([0.1, 0.01, 0.001], rel=1e-4)
    for handle in handles:
        handle.remove()
    model(torch.ones(1, 4)).sum().backward()
    assert model.weight.grad is not None


def test_groups_stay_when_a_step_fails():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    groups = optimizer.param_groups
    optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step_subset(optimizer, {0: [weight]})
    assert optimizer.param_groups is groups


def options(name, *, fused=False, rounding=False, full=False):
    return options_with(
        OptimizerOptions,
        MemoryOptions,
        TrainingOptions,
        optimizer_type=name,
        fused_backward_pass=fused,
        stochastic_rounding=rounding,
        full_bf16=full,
        seed=5,
    )


@pytest.mark.rows("R394")
@pytest.mark.parametrize(
    ("name", "fused", "full", "rounded"),
    [
        ("AdaFactor", True, True, True),
        ("AdaFactor", True, False, False),
        ("AdaFactor", False, True, False),
        ("AdamW", True, True, False),
    ],
)
def test_adafactor_rounds_bf16_stochastically_inside_the_backward_pass(name, fused, full, rounded):
    """A thousandth of the last bit of 1 is lost by rounding, and is there in the mean by chance."""
    opts = options(name, fused=fused, full=full)
    assert uses_stochastic_rounding(opts) == rounded
    weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    more = {"relative_step": False, "scale_parameter": False} if name == "AdaFactor" else {"weight_decay": 0.0}
    kind = transformers.Adafactor if name == "AdaFactor" else torch.optim.AdamW
    optimizer = kind([weight], lr=1e-4, **more)
    stepper = OptimizerStepper(opts, optimizer, optimizer)
    for number in range(20):
        stepper.start(number)
        weight.sum().backward()
        stepper.step()
        optimizer.zero_grad()
    assert (weight.float().mean().item() == pytest.approx(1 - 20e-4, abs=3e-4)) == rounded


def test_rounding_is_the_same_however_steps_are_taken():
    """At once, in parts and inside the backward pass: the stream of a weight depends on none of it."""
    results = []
    for fused, parts in itertools.product((False, True), repeat=2):
        model = Model().bfloat16()
        optimizer = optimizer_of(model, "AdamW")
        stepper = OptimizerStepper(options("AdamW", fused=fused, rounding=True), optimizer, optimizer)
        stepper._chunked = parts
        for number, x in enumerate(batches()):
            stepper.start(number)
            model(x.bfloat16()).square().mean().backward()
            stepper.step()
            optimizer.zero_grad()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
        assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    start = Model().bfloat16()
    assert not any(torch.equal(a, b) for a, b in zip(results[0], start.parameters(), strict=True))


@pytest.mark.parametrize("way", ["plain", "parts", "backward"])
def test_every_way_of_the_stepper_takes_the_steps(way):
    model = Model()
    optimizer = optimizer_of(model, "AdamW")
    parts = equal_parts(list(model.parameters()), 2) if way == "parts" else None
    stepper = OptimizerStepper(options("AdamW", fused=way == "backward"), optimizer, optimizer, parts)
    assert stepper.inside_backward == (way != "plain")
    assert_same(train(model, optimizer, stepper.step), optimizer, "AdamW")


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [4, 4, 2, 6]), (7, [4, 6, 6]), (8, [8, 8]), (9, [8, 8]), (10, [10, 6]), (99, [16])]
)
def test_parts_of_a_step_hold_as_many_elements_as_fit(most, sizes):
    weights = [nn.Parameter(torch.ones(size)) for size in (4, 4, 3, 2, 6)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    weights[2].grad = None
    optimizer = torch.optim.SGD([{"params": weights[:2]}, {"params": weights[2:]}], lr=0.5)
    seen = []
    optimizer.register_step_pre_hook(
        lambda taken, *_: seen.append(sum(w.numel() for group in taken.param_groups for w in group["params"]))
    )
    step_chunked(optimizer, most)
    assert seen == sizes
    assert [float(weight[0].detach()) for weight in weights] == [0.5, 0.5, 1, 0.5, 0.5]


def test_which_optimizers_look_at_each_weight_alone():
    for name in ("", "AdamW", "SGD", "AdaFactor", "transformers.Adafactor", "torch.optim.RAdam"):
        assert steps_each_weight_independently(OptimizerOptions(optimizer_type=name))
    for name in ("Prodigy", "DAdaptation", "AdamW8bit", "RAdamScheduleFree"):
        assert not steps_each_weight_independently(OptimizerOptions(optimizer_type=name))


# ---- several weights together, inside the backward pass


@pytest.mark.rows("R329", "R395")
@pytest.mark.parametrize("name", [*NAMES, "AdamW8bit", "Lion"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_groups_inside_the_backward_pass_change_nothing(name, count):
    plain, grouped = Model(), Model()
    optimizers = [any_optimizer_of(model, name) for model in (plain, grouped)]
    together = FusedGroups(optimizers[1], equal_parts(list(grouped.parameters()), count))
    expected = train(plain, optimizers[0], optimizers[0].step)
    for got, wanted in zip(train(grouped, optimizers[1], together.finish), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("sizes", "count", "parts"),
    [((4, 4, 4, 4), 2, [[4, 4], [4, 4]]), ((1, 1, 6), 4, [[1, 1], [6]]), ((4, 0), 2, [[4, 0]]), ((0,), 3, [[0]])],
)
def test_parts_of_about_equal_size(sizes, count, parts):
    found = equal_parts([torch.ones(size) for size in sizes], count)
    assert [[weight.numel() for weight in part] for part in found] == parts


def any_optimizer_of(model, name):
    if name in NAMES:
        return optimizer_of(model, name)
    groups = [{"params": list(model.parameters()), "lr": 1e-2, "name": "a"}]
    return make_optimizer(groups, OptimizerOptions(optimizer_type=name, learning_rate=1e-2))


def test_gradients_are_freed_as_soon_as_a_group_is_whole():
    model = Model()
    parts = parts_by_block(list(model.parameters()), [model.last, model.shared])
    assert [len(part) for part in parts] == [1, 1, 2]
    together = FusedGroups(optimizer_of(model, "SGD"), parts)
    seen = []
    model.first.weight.register_hook(lambda grad: seen.append(model.last.weight.grad))
    model(batches()[0]).square().mean().backward()
    assert seen == [None], "the last layer was stepped before the first had its gradient"
    together.finish()
    assert all(weight.grad is None for weight in model.parameters())


def test_parts_are_about_equal():
    weights = [torch.zeros(size) for size in (10, 10, 100, 40, 40, 10, 10)]
    parts = equal_parts(weights, 3)
    assert [sum(weight.numel() for weight in part) for part in parts] == [120, 40, 60]
    assert [len(part) for part in equal_parts(weights[:2], 5)] == [1, 1]
