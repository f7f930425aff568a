import types

import pytest
import torch

from library.errors import UserError
from library.training.optimizers import describe_optimizer, literal_args, make_optimizer


def options(**changes):
    values = {
        "optimizer_type": "",
        "use_8bit_adam": False,
        "use_lion_optimizer": False,
        "optimizer_args": None,
        "learning_rate": 1e-3,
    }
    return types.SimpleNamespace(**{**values, **changes})


def groups():
    torch.manual_seed(0)
    return [{"params": [torch.nn.Parameter(torch.randn(64, 64))], "lr": 5e-4, "name": "unet"}]


@pytest.mark.rows("R160", "R161", "R169", "C36")
@pytest.mark.parametrize(
    "chosen", [{"use_8bit_adam": True}, {"optimizer_type": "AdamW8bit"}, {"optimizer_type": "adamw8bit"}]
)
def test_8bit_adam_runs_on_the_cpu(chosen):
    made = groups()
    before = made[0]["params"][0].detach().clone()
    optimizer = make_optimizer(made, options(**chosen))
    made[0]["params"][0].pow(2).sum().backward()
    optimizer.step()
    assert type(optimizer).__name__ == "AdamW8bit"
    assert not torch.equal(before, made[0]["params"][0])


def test_adamw_follows_its_definition():
    """AdamW's first step moves every weight by lr * (sign of the gradient + decay * weight); float32, eps 1e-8."""
    made = groups()
    weight = made[0]["params"][0]
    before = weight.detach().clone()
    optimizer = make_optimizer(made, options(optimizer_args=["weight_decay=0.1"]))
    (weight * torch.linspace(-1, 1, 64 * 64).reshape(64, 64)).sum().backward()
    gradient = weight.grad.clone()
    optimizer.step()
    expected = before * (1 - 5e-4 * 0.1) - 5e-4 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(weight.detach(), expected, atol=2e-7, rtol=0)


def test_group_rates_and_names_survive():
    optimizer = make_optimizer(groups(), options(optimizer_type="SGDNesterov"))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["name"], group["nesterov"], group["momentum"]) == (5e-4, "unet", True, 0.9)


def test_any_class_of_torch_optim():
    assert isinstance(make_optimizer(groups(), options(optimizer_type="RMSprop")), torch.optim.RMSprop)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer_type": "AdamWW"}, "AdamWW"),
        ({"optimizer_args": ["weight_decay"]}, "weight_decay"),
        ({"optimizer_args": ["no_such=1"]}, "no_such"),
    ],
)
def test_mistakes_are_named(changes, said):
    with pytest.raises(UserError, match=said):
        make_optimizer(groups(), options(**changes))


def test_literals_and_description():
    assert literal_args("--optimizer_args", ["betas=0.9,0.99", "decouple=True"]) == {
        "betas": (0.9, 0.99),
        "decouple": True,
    }
    chosen = options(optimizer_args=["weight_decay=0.1"])
    assert describe_optimizer(make_optimizer(groups(), chosen), chosen) == "torch.optim.adamw.AdamW(weight_decay=0.1)"
