"""What a file says of an optimizer is looked at before kernels see it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from library.options.optimizer import OptimizerOptions
from library.training.optimizer_states import check
from library.training.optimizers import make_optimizer

OPTIMIZERS = {
    "AdamW": [],
    "SGD": ["momentum=0.9"],
    "Lion": [],
    "AdaFactor": ["relative_step=False"],
    "Prodigy": [],
    "DAdaptAdam": [],
    "AdamWScheduleFree": [],
    "RAdam": [],
    "Adagrad": [],
}


def make(name="AdamW", arguments=()):
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    nn.init.zeros_(layer.bias)  # as the second half of a LoRA
    options = OptimizerOptions(optimizer_type=name, optimizer_args=list(arguments), learning_rate=1.0)
    groups = [{"params": list(layer.parameters()), "lr": 1.0, "name": "all"}]
    return layer, make_optimizer(groups, options)


def trained(name="AdamW", arguments=()):
    layer, optimizer = make(name, arguments)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(2, 6)).pow(2).sum().backward()
        optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_states_own_optimizer_takes_it_and_nothing_is_changed(name):
    saved = trained(name, OPTIMIZERS[name])
    layer, optimizer = make(name, OPTIMIZERS[name])
    before, random = str(optimizer.state_dict()), torch.get_rng_state()
    weights = [weight.clone() for weight in layer.parameters()]
    check(saved, optimizer)
    assert str(optimizer.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(map(torch.equal, weights, layer.parameters()))
    check(make(name, OPTIMIZERS[name])[1].state_dict(), optimizer)  # of a run that has not stepped


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("cut", ["shorter", "longer", "single", "flat"])
def test_tensors_of_another_shape_are_refused(name, cut):
    saved = trained(name, OPTIMIZERS[name])
    tensors = [(values, key) for values in saved["state"].values() for key, one in values.items() if _is_large(one)]
    values, key = tensors[0]
    flat = values[key].reshape(-1)
    values[key] = {"shorter": flat[:2], "longer": flat.repeat(3), "single": flat[0], "flat": flat[:, None]}[cut].clone()
    with pytest.raises(ValueError, match=f"its {key} of tensor 0 has the shape"):
        check(saved, make(name, OPTIMIZERS[name])[1])


def _is_large(one):
    return isinstance(one, torch.Tensor) and one.numel() > 1


def state_without(key):
    saved = trained()
    del saved["state"][1][key]
    return saved


def with_group(**values):
    saved = trained()
    saved["param_groups"][0].update(values)
    return saved


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (lambda: None, "no state of an optimizer"),
        (lambda: {"state": [], "param_groups": []}, "no state of an optimizer"),
        (lambda: {"state": {}, "param_groups": [3]}, "no state of an optimizer"),
        (lambda: {"state": {}, "param_groups": []}, "groups of 0 tensors, and the run has 2"),
        (lambda: {"state": {}, "param_groups": [{"params": [0]}]}, "groups of 1 tensors, and the run has 2"),
        (lambda: state_without("exp_avg_sq"), "it has no exp_avg_sq of tensor 1, so another optimizer made it"),
        (lambda: with_group(lr="fast"), "its lr is 'fast'"),
        (lambda: with_group(lr=None), "its lr is 'None'"),
        (lambda: with_group(eps=float("nan")), "its eps is 'nan'"),
        (lambda: with_group(betas=(0.9, 0.99, 0.999)), "its betas is"),
        (lambda: with_group(betas=0.9), "its betas is '0.9'"),
        (lambda: {**trained(), "state": {0: 5}}, "of tensor 0 is no table"),
    ],
)
def test_odd_contents_are_refused(saved, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        check(saved(), make()[1])


def test_wrapped_optimizers_and_real_steps_are_left_alone():
    """What a schedule or accelerate has put around `step` is not called: it would step the real weights."""
    _, optimizer = make()
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.register_step_post_hook(lambda *_: pytest.fail("a hook was called"))
    check(trained(), optimizer)
    assert not optimizer.state
    assert not getattr(optimizer, "_opt_called", False)
