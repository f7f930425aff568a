"""Every optimizer against its class built by hand, and what is said where one cannot be used."""

from __future__ import annotations

import copy
import importlib
import io
import logging
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from library.errors import UserError
from library.options.base import options_of
from library.options.optimizer import OPTIMIZERS, SCHEDULES, OptimizerOptions, literal_args
from library.registry import groups_for
from library.training.lr_schedules import make_schedule
from library.training.optimizers import (
    averaged_weights,
    describe_optimizer,
    effective_rates,
    make_optimizer,
    optimizer_mode,
)

for package in ("bitsandbytes", "dadaptation", "lion_pytorch", "prodigyopt", "prodigyplus", "schedulefree"):
    pytest.importorskip(package)

NESTEROV = {"nesterov": True, "momentum": 0.9}
FULL_PATHS = {  # and the rate they are used with
    "bitsandbytes.optim.AdEMAMix8bit": 1e-3,
    "bitsandbytes.optim.PagedAdEMAMix8bit": 1e-3,
    "prodigyplus.ProdigyPlusScheduleFree": 1.0,
    "torch.optim.Muon": 1e-3,
}
ADAPTIVE = [name for name in OPTIMIZERS if name.startswith(("DAdapt", "Prodigy"))]
SCHEDULE_FREE = ["RAdamScheduleFree", "AdamWScheduleFree", "SGDScheduleFree", "prodigyplus.ProdigyPlusScheduleFree"]
ALL = [*OPTIMIZERS, *FULL_PATHS]
# steps of paged optimizers warn on a CPU that there is nothing to page to
pytestmark = pytest.mark.filterwarnings("ignore")


def rate_of(name: str) -> float:
    return 1.0 if name in ADAPTIVE else FULL_PATHS.get(name, 1e-3)


def options(name: str = "", **changes) -> OptimizerOptions:
    return OptimizerOptions(**{"optimizer_type": name, "learning_rate": rate_of(name), **changes})


def weights(seed: int = 0) -> torch.nn.Parameter:
    """64 x 64 values: the smallest size of which bitsandbytes keeps the state in 8 bits."""
    rng = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(64, 64, generator=rng))


def groups(*rates: float) -> list[dict]:
    return [{"params": [weights(i)], "lr": rate, "name": f"part{i}"} for i, rate in enumerate(rates or (5e-4,))]


def steps(optimizer, schedule=None, *, first: int = 0, count: int = 2) -> None:
    """Steps down a bowl, with gradients that depend on the weights and on the step."""
    for index in range(first, first + count):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rng = torch.Generator().manual_seed(index)
                noise = torch.randn(parameter.shape, generator=rng)
                parameter.grad = (0.01 * (parameter.detach() + 0.5 * noise)).to(parameter.dtype)
        optimizer.step()
        if schedule is not None:
            schedule.step()


def values(optimizer) -> list[torch.Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def by_hand(name: str, made: list[dict]) -> torch.optim.Optimizer:
    module, _, attribute = OPTIMIZERS.get(name, name).rpartition(".")
    cls = getattr(importlib.import_module(module), attribute)
    if name == "AdaFactor":
        return cls([{k: v for k, v in group.items() if k != "lr"} for group in made])
    arguments = NESTEROV if name.startswith("SGDNesterov") else {"fused": True} if name == "AdamW" else {}
    return cls(made, lr=rate_of(name), **arguments)


# ---- what each one computes


@pytest.mark.rows("R160", "R161", "R166", "R167", "R168", "R169", "C36", "C40", "C85")
@pytest.mark.parametrize(("given", "name"), [(n, n) for n in ALL] + [(n.lower(), n) for n in OPTIMIZERS])
def test_first_steps_are_those_of_the_class(given, name):
    rates = (1.0, 1.0) if rate_of(name) == 1.0 else (5e-4, 1e-3)
    ours = make_optimizer(groups(*rates), options(given, learning_rate=rate_of(name)))
    theirs = by_hand(name, groups(*rates))
    assert type(ours) is type(theirs)
    optimizer_mode(theirs, training=True)
    before = values(ours)
    for optimizer in (ours, theirs):
        steps(optimizer, count=8)  # RAdam begins with four that are left out
    for training in (True, False):
        optimizer_mode(ours, training=training)
        optimizer_mode(theirs, training=training)
        for mine, other, start in zip(values(ours), values(theirs), before, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)
            assert not torch.equal(mine, start)


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


@pytest.mark.rows("R160")
@pytest.mark.parametrize(("flag", "name"), [("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")])
def test_short_options(flag, name):
    assert type(make_optimizer(groups(), options(**{flag: True}))).__name__ == name


@pytest.mark.parametrize("name", ["RMSprop", "ASGD", "NAdam", "torch.optim.RMSprop", "torch.optim.Adafactor"])
def test_any_class_of_torch_optim(name):
    optimizer = make_optimizer(groups(), options(name))
    before = values(optimizer)
    steps(optimizer)
    assert type(optimizer) is getattr(torch.optim, name.rpartition(".")[2])
    assert not torch.equal(before[0], values(optimizer)[0])


def test_group_rates_and_names_survive_and_the_given_groups_stay_as_they_are():
    given = groups(5e-4)
    optimizer = make_optimizer(given, options("SGDNesterov"))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["name"], group["nesterov"], group["momentum"]) == (5e-4, "part0", True, 0.9)
    assert set(given[0]) == {"params", "lr", "name"}


def test_arguments_override_what_is_set_for_the_user():
    assert make_optimizer(groups(), options("SGDNesterov", optimizer_args=["momentum=0.5"])).defaults["momentum"] == 0.5
    assert not make_optimizer(groups(), options(optimizer_args=["foreach=True"])).defaults["fused"]


@pytest.mark.rows("R170")
@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lion", "SGDNesterov", "AdaFactor"])
def test_a_negative_rate_leads_the_other_way(name):
    arguments = ["relative_step=False"] if name == "AdaFactor" else ["weight_decay=0"]
    forth, back = (
        make_optimizer(groups(rate), options(name, learning_rate=rate, optimizer_args=arguments))
        for rate in (1e-3, -1e-3)
    )
    start = values(forth)[0]
    for optimizer in (forth, back):
        steps(optimizer, count=1)
    moved = values(forth)[0] - start
    assert moved.abs().max() > 0
    torch.testing.assert_close(values(back)[0] - start, -moved, atol=1e-6, rtol=0)


def test_the_random_generators_stay_as_they_were():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    made = groups(1.0)
    made[0]["params"][0].data = made[0]["params"][0].data.bfloat16()  # rounded at random
    make_optimizer(made, options("prodigyplus.ProdigyPlusScheduleFree"))
    assert torch.equal(torch.get_rng_state(), before)


# ---- states


@pytest.mark.parametrize("name", ALL)
def test_a_saved_state_goes_on_where_it_was(name):
    """Through torch.save and a load with weights_only=True."""

    def build():
        chosen = options(name, lr_scheduler="constant" if name in SCHEDULE_FREE else "cosine")
        optimizer = make_optimizer(groups(rate_of(name)), chosen)
        return optimizer, make_schedule(optimizer, chosen, 8)

    straight, schedule = build()
    steps(straight, schedule, count=6)

    first, schedule = build()
    steps(first, schedule, count=3)
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "schedule": schedule.state_dict(), "weights": values(first)}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second, schedule = build()
    with torch.no_grad():
        second.param_groups[0]["params"][0].copy_(saved["weights"][0])
    second.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    steps(second, schedule, first=3, count=3)
    for optimizer in (straight, second):
        optimizer_mode(optimizer, training=False)
    torch.testing.assert_close(values(second)[0], values(straight)[0], atol=0, rtol=0)
    assert effective_rates(second) == effective_rates(straight)
    assert second.param_groups[0]["lr"] == straight.param_groups[0]["lr"]


# ---- optimizers that find the rate themselves


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_first_rate_counts_for_all_groups(name, caplog):
    with caplog.at_level(logging.WARNING):
        optimizer = make_optimizer(groups(1.0, 0.5), options(name))
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]
    assert f"{name} takes one rate for everything: 1, that of part0, counts; of 1, 0.5" in caplog.text
    alike = make_optimizer(groups(1.0, 1.0), options(name))
    for each in (optimizer, alike):
        steps(each, count=4)
    for mine, other in zip(values(optimizer), values(alike), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", [*ADAPTIVE, "prodigyplus.ProdigyPlusScheduleFree"])
def test_rates_that_are_no_factor_are_reported(name, caplog):
    with caplog.at_level(logging.WARNING):
        make_optimizer(groups(1.0), options(name))
        assert caplog.text == ""
        make_optimizer(groups(1e-4), options(name))
    assert f"{name} finds the rate itself" in caplog.text
    with pytest.raises(UserError, match=r"--learning_rate: .* needs a rate above 0"):
        make_optimizer(groups(-1e-4), options(name))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_effective_rates(name):
    optimizer = make_optimizer(groups(0.5), options(name))
    started = effective_rates(optimizer)
    assert started == [pytest.approx(0.5 * 1e-6)]  # d begins at 1e-6
    steps(optimizer, count=30)
    (rate,) = effective_rates(optimizer)
    assert rate == float(optimizer.param_groups[0]["d"]) * 0.5
    assert rate > started[0]


def test_other_optimizers_have_no_rates_of_their_own():
    assert effective_rates(make_optimizer(groups(), options())) is None
    assert effective_rates(make_optimizer(groups(), options("AdaFactor"))) is None


# ---- AdaFactor


@pytest.mark.parametrize(
    ("arguments", "relative", "warm"),
    [
        (None, True, False),
        (["relative_step=True"], True, False),
        (["warmup_init=True"], True, True),
        (["warmup_init=True", "relative_step=False"], True, True),
        (["relative_step=False"], False, False),
    ],
)
def test_adafactor_sets_its_own_rate_unless_reported_otherwise(arguments, relative, warm):
    made = make_optimizer(groups(5e-4, 1e-3), options("AdaFactor", optimizer_args=arguments))
    assert [(g["relative_step"], g["warmup_init"]) for g in made.param_groups] == [(relative, warm)] * 2
    assert [g["lr"] for g in made.param_groups] == ([None, None] if relative else [5e-4, 1e-3])


def test_adafactor_names_the_rates_it_drops(caplog):
    with caplog.at_level(logging.WARNING):
        make_optimizer(groups(1e-3, 1e-3), options("AdaFactor"))
        assert caplog.text == ""
        make_optimizer(groups(5e-4, 1e-3), options("AdaFactor"))
    assert "the rates 0.0005, 0.001 are not used" in caplog.text


# ---- schedule-free


@pytest.mark.rows("R166", "R167", "C40")
@pytest.mark.parametrize("name", SCHEDULE_FREE)
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "through accelerate"])
def test_modes_switch_between_the_weights_trained_on_and_their_average(name, wrapped):
    optimizer = make_optimizer(groups(rate_of(name)), options(name))
    if wrapped:
        optimizer = Accelerator(cpu=True).prepare_optimizer(optimizer)
    steps(optimizer, count=8)
    trained = values(optimizer)[0]
    optimizer_mode(optimizer, training=False)
    averaged = values(optimizer)[0]
    optimizer_mode(optimizer, training=False)
    assert torch.equal(values(optimizer)[0], averaged)
    optimizer_mode(optimizer, training=True)
    assert not torch.equal(trained, averaged)
    torch.testing.assert_close(values(optimizer)[0], trained, atol=1e-5, rtol=0)
    steps(optimizer)  # and can go on


@pytest.mark.rows("R166", "C40")
@pytest.mark.parametrize("name", SCHEDULE_FREE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_look_at_the_average_leaves_the_training_as_it_was(name, dtype):
    """bfloat16 shows it: there the optimizer's own way back is far from exact."""

    def build():
        made = groups(rate_of(name))
        made[0]["params"] = [torch.nn.Parameter((1e-5 * weights().detach()).to(dtype))]  # steps must not be lost
        # rounding at random would differ between the two for reasons of its own
        arguments = ["stochastic_rounding=False"] if "." in name else None
        return Accelerator(cpu=True).prepare_optimizer(make_optimizer(made, options(name, optimizer_args=arguments)))

    looked, straight = build(), build()
    for optimizer in (looked, straight):
        steps(optimizer, count=8)
    with averaged_weights(looked):
        seen = values(looked)[0]
    with pytest.raises(KeyboardInterrupt), averaged_weights(looked.optimizer):
        raise KeyboardInterrupt
    assert not torch.equal(seen, values(looked)[0])
    for optimizer in (looked, straight):
        steps(optimizer, first=8)
    assert torch.equal(values(looked)[0], values(straight)[0])


def test_modes_do_nothing_elsewhere():
    optimizer = make_optimizer(groups(), options())
    steps(optimizer)
    before = copy.deepcopy(optimizer.state_dict()["state"]), values(optimizer)[0]
    optimizer_mode(optimizer, training=False)
    with averaged_weights(Accelerator(cpu=True).prepare_optimizer(optimizer)):
        assert torch.equal(values(optimizer)[0], before[1])
    torch.testing.assert_close(optimizer.state_dict()["state"], before[0], atol=0, rtol=0)
    assert torch.equal(values(optimizer)[0], before[1])


# ---- mistakes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "AdamWW"}, "--optimizer_type: torch.optim has no class 'AdamWW'"),
        ({"name": "bitsandbytes.optim.AdamX"}, "--optimizer_type: bitsandbytes.optim has no class 'AdamX'"),
        ({"name": "no_such_package.Adam"}, "--optimizer_type: no_such_package.Adam cannot be imported"),
        ({"name": "torch.nn.Linear"}, "--optimizer_type: torch.nn.Linear is no torch.optim.Optimizer"),
        ({"name": "LBFGS"}, "--optimizer_type: LBFGS cannot train on cpu here"),
        ({"name": "SparseAdam"}, "--optimizer_type: SparseAdam cannot train on cpu here: SparseAdam does not support"),
        ({"optimizer_args": ["weight_decay"]}, "--optimizer_args: 'weight_decay' is not name=value"),
        ({"optimizer_args": ["no_such=1"]}, "--optimizer_args: AdamW has no argument 'no_such'; it takes betas, eps"),
        ({"name": "Lion", "optimizer_args": ["eps=1"]}, "it takes betas, weight_decay, use_triton, decoupled"),
        ({"optimizer_args": ["betas=2,3"]}, "--optimizer_args: AdamW refuses fused=True, betas=(2, 3): Invalid beta"),
        ({"name": "Lion", "optimizer_args": ["betas=2,3"]}, "refuses betas=(2, 3): AssertionError"),
        ({"optimizer_args": ["lr=1"]}, "--optimizer_args: the rate is not given here; use --learning_rate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named_in_one_line(changes, said):
    with pytest.raises(UserError) as caught:
        make_optimizer(groups(), options(**changes))
    (line,) = caught.value.problems
    assert said in line
    assert "\n" not in line


def test_a_class_that_cannot_run_on_the_device_is_refused_before_training(monkeypatch):
    """As optimizers do whose kernels are not built for the device: the class is there, its first step fails."""

    class NeedsKernel(torch.optim.SGD):
        def step(self, closure=None):
            raise NotImplementedError("no kernel for this device\nand a long explanation")

    module = types.ModuleType("own_optimizers")
    module.NeedsKernel = NeedsKernel
    monkeypatch.setitem(sys.modules, "own_optimizers", module)
    with pytest.raises(UserError) as caught:
        make_optimizer(groups(), options("own_optimizers.NeedsKernel"))
    assert caught.value.problems == (
        "--optimizer_type: own_optimizers.NeedsKernel cannot train on cpu here: no kernel for this device",
    )


def test_literals_and_description():
    assert literal_args("--optimizer_args", ["betas=0.9,0.99", "decouple=True"]) == {
        "betas": (0.9, 0.99),
        "decouple": True,
    }
    chosen = options(optimizer_args=["weight_decay=0.1"])
    assert describe_optimizer(make_optimizer(groups(), chosen), chosen) == "torch.optim.adamw.AdamW(weight_decay=0.1)"
    plain = options("AdaFactor")
    assert describe_optimizer(make_optimizer(groups(), plain), plain) == "transformers.optimization.Adafactor"


# ---- the guide

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "optimizers.md"


def test_the_guide_has_every_optimizer_and_every_schedule():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", GUIDE.read_text("utf-8"), flags=re.M)
    assert {name: text.strip("`") for name, text in rows if name in OPTIMIZERS} == OPTIMIZERS
    assert {name for name, _ in rows} == {*OPTIMIZERS, *SCHEDULES}


def test_the_flags_of_the_guide_exist():
    known = {option.flag for group in groups_for("sd", "network") for option in options_of(group)}
    assert set(re.findall(r"--\w+", GUIDE.read_text("utf-8"))) <= known
