"""Rates against closed formulas, computed here, and against the schedules of torch built by hand."""

from __future__ import annotations

import io
import math

import pytest
import torch

from library.errors import UserError
from library.options.optimizer import SCHEDULES, TORCH_SCHEDULES, OptimizerOptions
from library.training.lr_schedules import as_steps, dry_run, end_epoch, make_schedule, observe_losses, wants_loss
from library.training.optimizers import make_optimizer


def options(**changes) -> OptimizerOptions:
    return OptimizerOptions(**{"learning_rate": 1.0, **changes})


def sgd(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)


def run(optimizer, schedule, total: int) -> list[float]:
    """The rate that each step is done with."""
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def rates(chosen: OptimizerOptions, total: int) -> list[float]:
    optimizer = sgd(chosen.learning_rate)
    return run(optimizer, make_schedule(optimizer, chosen, total), total)


@pytest.mark.rows("R165", "C86", "C87")
@pytest.mark.parametrize(("value", "steps"), [(10, 10), (0.1, 20), (0, 0), (None, 0), (0.0, 0)])
def test_steps_or_a_share_of_the_run(value, steps):
    assert as_steps(value, 200) == steps


@pytest.mark.rows("R163")
def test_warm_up():
    assert rates(options(lr_scheduler="constant_with_warmup", lr_warmup_steps=4), 8) == pytest.approx(
        [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    )


@pytest.mark.rows("R162")
@pytest.mark.parametrize(
    ("chosen", "formula"),
    [
        ({"lr_scheduler": "constant"}, lambda t: 1.0),
        ({"lr_scheduler": "linear"}, lambda t: 1 - t),
        ({"lr_scheduler": "cosine"}, lambda t: 0.5 * (1 + math.cos(math.pi * t))),
        (
            {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 2},
            lambda t: 0.5 * (1 + math.cos(math.pi * (2 * t % 1))),
        ),
        ({"lr_scheduler": "polynomial", "lr_scheduler_power": 2}, lambda t: (1 - 1e-7) * (1 - t) ** 2 + 1e-7),
    ],
)
def test_shapes(chosen, formula):
    assert rates(options(**chosen), 20) == pytest.approx([formula(i / 20) for i in range(20)], abs=1e-6)


@pytest.mark.rows("R164")
def test_cosine_with_min_lr_ends_at_the_floor():
    seen = rates(options(lr_scheduler="cosine_with_min_lr", lr_scheduler_min_lr_ratio=0.1), 1000)
    assert seen[500] == pytest.approx(0.1 + 0.9 * 0.5, abs=1e-6)
    assert seen[-1] == pytest.approx(0.1, abs=1e-4)


@pytest.mark.rows("R164")
def test_warmup_stable_decay_has_three_parts():
    seen = rates(options(lr_scheduler="warmup_stable_decay", lr_warmup_steps=0.1, lr_decay_steps=0.2), 100)
    assert seen[5] == pytest.approx(0.5)
    assert set(seen[10:80]) == {1.0}
    assert seen[90] == pytest.approx(0.5, abs=0.02)
    assert seen[-1] < 0.02


@pytest.mark.rows("R164")
def test_inverse_sqrt():
    seen = rates(options(lr_scheduler="inverse_sqrt", lr_scheduler_timescale=9), 30)
    assert seen[27] == pytest.approx(1 / math.sqrt(27 / 9 + 1), rel=1e-6)


def test_more_warm_up_than_steps_is_named():
    with pytest.raises(UserError, match="--lr_warmup_steps"):
        rates(options(lr_scheduler="cosine", lr_warmup_steps=30), 20)


@pytest.mark.rows("R164")
def test_inverse_sqrt_counts_in_warm_ups_without_a_time_scale():
    seen = rates(options(lr_scheduler="inverse_sqrt", lr_warmup_steps=9), 40)
    assert seen[3] == pytest.approx(3 / 9)
    assert seen[36] == pytest.approx(1 / math.sqrt(36 / 9))


def test_cosine_warmup_with_min_lr():
    """Counts from one: the first step is done at 1/4 of the rate already, the last at the floor itself."""
    chosen = options(lr_scheduler="cosine_warmup_with_min_lr", lr_warmup_steps=4, lr_scheduler_min_lr_ratio=0.2)
    seen = rates(chosen, 20)
    assert seen[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    expected = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * (i - 3) / 16)) for i in range(4, 20)]
    assert seen[4:] == pytest.approx(expected, abs=1e-6)
    assert seen[-1] == pytest.approx(0.2)
    assert rates(options(lr_scheduler="cosine_warmup_with_min_lr"), 20)[-1] == pytest.approx(0)


@pytest.mark.parametrize("rules", ["step_rules=1:5,0.1:8,0.01", "step_rules='1:5, 0.1:8, 0.01'"])
def test_piecewise_constant(rules):
    seen = rates(options(lr_scheduler="piecewise_constant", lr_scheduler_args=[rules], learning_rate=2.0), 12)
    assert seen == pytest.approx([2.0] * 5 + [0.2] * 3 + [0.02] * 4)


@pytest.mark.rows("R165", "C86", "C87")
def test_warm_up_over_a_share_of_the_run():
    seen = rates(options(lr_scheduler="linear", lr_warmup_steps=0.1), 40)
    assert seen == pytest.approx([i / 4 for i in range(4)] + [(40 - i) / 36 for i in range(4, 40)])


@pytest.mark.rows("R170")
@pytest.mark.parametrize("name", [n for n in SCHEDULES if n not in ("adafactor", "reduce_lr_on_plateau")])
def test_negative_rates_take_the_same_course(name):
    """Built as in a run: the optimizer's default is positive, its groups' rates are not."""
    arguments = ["step_rules=1:5,0.1"] if name == "piecewise_constant" else None
    seen = {}
    for rate in (1e-4, -1e-4):
        chosen = options(lr_scheduler=name, lr_scheduler_args=arguments, learning_rate=rate)
        optimizer = make_optimizer([{"params": [torch.nn.Parameter(torch.zeros(4))]}], chosen)
        seen[rate] = run(optimizer, make_schedule(optimizer, chosen, 20), 20)
    assert seen[-1e-4] == pytest.approx([-rate for rate in seen[1e-4]])
    assert seen[1e-4][0] == pytest.approx(1e-4, rel=0.01)


@pytest.mark.parametrize("rate", [0.0, 1e-8])
def test_polynomial_takes_small_rates(rate):
    chosen = options(lr_scheduler="polynomial", learning_rate=rate)
    optimizer = make_optimizer([{"params": [torch.nn.Parameter(torch.zeros(4))], "lr": 1e-8}], chosen)
    seen = run(optimizer, make_schedule(optimizer, chosen, 10), 10)
    assert seen == pytest.approx([1e-8 * (1 - i / 10) for i in range(10)])


def test_arguments_reach_named_schedules():
    chosen = options(lr_scheduler="warmup_stable_decay", lr_decay_steps=10, lr_scheduler_args=['decay_type="linear"'])
    assert rates(chosen, 20)[10:] == pytest.approx([1 - i / 10 for i in range(10)])
    assert rates(options(lr_scheduler="polynomial", lr_scheduler_args=["lr_end=0.5"]), 20)[10] == pytest.approx(0.75)
    assert rates(options(lr_scheduler="cosine_with_min_lr", lr_scheduler_args=["min_lr=0.5"]), 20)[10] == 0.75


# ---- reduce_lr_on_plateau


@pytest.mark.parametrize(
    "chosen",
    [
        {"lr_scheduler": "reduce_lr_on_plateau"},
        {"lr_scheduler_type": "ReduceLROnPlateau"},
        {"lr_scheduler_type": "torch.optim.lr_scheduler.ReduceLROnPlateau"},
    ],
)
def test_a_plateau_of_the_loss_lowers_the_rate(chosen):
    optimizer = sgd()
    schedule = make_schedule(optimizer, options(**chosen, lr_scheduler_args=["patience=2", "factor=0.5"]), 100)
    assert wants_loss(schedule)
    seen = []
    for loss in (3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.5):
        for _ in range(5):
            optimizer.step()
            schedule.step()
        schedule.step(loss)
        seen += schedule.get_last_lr()
    assert seen == [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5]


# ---- adafactor


def adafactor(*, name: str = "constant", shape: tuple[int, ...] = (8, 8), args: list[str] | None = None):
    chosen = options(optimizer_type="AdaFactor", lr_scheduler=name, learning_rate=1e-4, optimizer_args=args)
    weight = torch.nn.Parameter(torch.full(shape, 2.0))
    optimizer = make_optimizer([{"params": [weight], "lr": 5e-4}], chosen)
    return weight, optimizer, make_schedule(optimizer, chosen, 100)


@pytest.mark.parametrize(("name", "initial"), [("constant", 1e-4), ("adafactor", 1e-4), ("AdaFactor:3e-5", 3e-5)])
def test_adafactor_shows_the_rate_it_sets(name, initial):
    """min(0.01, 1 / sqrt(step)) times the root mean square of the weight before the step."""
    weight, optimizer, schedule = adafactor(name=name)
    assert schedule.get_last_lr() == [initial]
    for _ in range(3):
        size = weight.detach().pow(2).mean().sqrt().item()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        assert schedule.get_last_lr() == [pytest.approx(0.01 * size)]
        assert all(isinstance(rate, float) for rate in schedule.get_last_lr())


def test_adafactor_warm_up():
    weight, optimizer, schedule = adafactor(args=["warmup_init=True", "scale_parameter=False"])
    for step in (1, 2, 3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        schedule.step()
        assert schedule.get_last_lr() == [pytest.approx(1e-6 * step)]


def test_adafactor_without_relative_step_takes_other_schedules():
    _, optimizer, schedule = adafactor(name="linear", args=["relative_step=False"])
    assert run(optimizer, schedule, 100)[50] == pytest.approx(2.5e-4)


# ---- schedule-free


@pytest.mark.rows("R166", "C40")
def test_schedule_free_optimizers_keep_their_rate():
    chosen = options(optimizer_type="AdamWScheduleFree", learning_rate=1e-3)
    optimizer = make_optimizer([{"params": [torch.nn.Parameter(torch.zeros(4))]}], chosen)
    assert run(optimizer, make_schedule(optimizer, chosen, 10), 10) == [1e-3] * 10


# ---- --lr_scheduler_type

CLASSES = {
    "ConstantLR": {"factor": 0.5, "total_iters": 5},
    "CosineAnnealingLR": {"T_max": 20, "eta_min": 0.1},
    "CosineAnnealingWarmRestarts": {"T_0": 7},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 4},
    "ExponentialLR": {"gamma": 0.9},
    "LinearLR": {"start_factor": 0.25, "total_iters": 8},
    "MultiStepLR": {"milestones": [5, 12], "gamma": 0.1},
    "OneCycleLR": {"max_lr": 2.0, "total_steps": 20},
    "PolynomialLR": {"total_iters": 20, "power": 2.0},
    "StepLR": {"step_size": 6, "gamma": 0.5},
}


@pytest.mark.parametrize("prefix", ["", "torch.optim.lr_scheduler."])
@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_torch(name, prefix):
    entries = [f"{key}={value!r}" for key, value in CLASSES[name].items()]
    seen = rates(options(lr_scheduler_type=prefix + name, lr_scheduler_args=entries), 20)
    optimizer = sgd()
    by_hand = getattr(torch.optim.lr_scheduler, name)(optimizer, **CLASSES[name])
    assert seen == pytest.approx(run(optimizer, by_hand, 20), abs=1e-12)
    assert len(set(seen)) > 1


def test_every_class_of_torch_that_is_offered_is_tried():
    assert set(TORCH_SCHEDULES) == {*CLASSES, "ReduceLROnPlateau"}


# ---- states


@pytest.mark.parametrize(
    "chosen",
    [
        *({"lr_scheduler": name} for name in SCHEDULES if name not in ("adafactor", "piecewise_constant")),
        {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules=1:5,0.1:12,0.01"]},
        *(
            {"lr_scheduler_type": name, "lr_scheduler_args": [f"{k}={v!r}" for k, v in arguments.items()]}
            for name, arguments in CLASSES.items()
        ),
    ],
    ids=lambda chosen: next(value for value in chosen.values() if isinstance(value, str)),
)
def test_a_saved_state_goes_on_where_it_was(chosen):
    """Through torch.save and a load with weights_only=True, with the optimizer's state as in a run."""
    chosen = options(**chosen)

    def build():
        optimizer = sgd()
        return optimizer, make_schedule(optimizer, chosen, 20)

    straight = run(*build(), 20)
    optimizer, schedule = build()
    begun = run(optimizer, schedule, 9)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), schedule.state_dict()), file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    optimizer, schedule = build()
    optimizer.load_state_dict(states[0])
    schedule.load_state_dict(states[1])
    assert begun + run(optimizer, schedule, 11) == straight


def test_a_plateau_counts_on_after_a_load():
    chosen = options(lr_scheduler="reduce_lr_on_plateau", lr_scheduler_args=["patience=2"])
    first, second = make_schedule(sgd(), chosen, 9), make_schedule(sgd(), chosen, 9)
    for loss in (1.0, 1.0, 1.0):
        first.step(loss)
    second.load_state_dict(first.state_dict())
    second.step(1.0)
    assert second.get_last_lr() == [pytest.approx(0.1)]


def test_the_losses_of_an_epoch_that_is_cut_count_on():
    chosen = options(lr_scheduler="reduce_lr_on_plateau")
    losses = [torch.tensor(value) for value in (0.5, 0.25, 1.0, 0.125)]
    straight, first, second = (make_schedule(sgd(), chosen, 9) for _ in range(3))
    straight.observe(losses[:3])
    straight.observe(losses[3:])
    first.observe(losses[:3])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.observe(losses[3:])
    assert second.epoch_mean() == straight.epoch_mean() == 1.875 / 4
    assert second.epoch_mean() is None


@pytest.mark.parametrize("validated", [False, True])
def test_the_end_of_an_epoch_steps_by_validation_or_by_the_mean_over_processes(validated):
    optimizer = sgd()
    schedule = make_schedule(
        optimizer, options(lr_scheduler="reduce_lr_on_plateau", lr_scheduler_args=["patience=0"]), 9
    )
    end_epoch(schedule, 1.0, lambda mean: mean)  # nothing was seen, so this is no epoch
    assert schedule.last_epoch == 0
    for losses, validation in (([1.0, 3.0], 7.0), ([1.0], 7.0)):
        observe_losses(schedule, [torch.tensor(loss) for loss in losses])
        end_epoch(schedule, validation if validated else None, lambda mean: mean + 10)
    assert schedule.last_epoch == 2
    # 12, then 11: the loss falls; of the validation loss it does not.
    assert schedule.best == (7.0 if validated else 11.0)
    assert isinstance(schedule.best, float)  # as it is written into states
    assert schedule.get_last_lr() == [pytest.approx(0.1 if validated else 1.0)]


def test_other_schedules_pay_no_heed_to_losses():
    optimizer = sgd()
    schedule = make_schedule(optimizer, options(lr_scheduler="cosine"), 4)
    observe_losses(schedule, [torch.tensor(1.0)])
    end_epoch(schedule, 1.0, lambda mean: mean)
    assert run(optimizer, schedule, 1) == [1.0]


# ---- mistakes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"lr_scheduler": "cosine", "lr_scheduler_args": ["no_such=1"]},
            "--lr_scheduler_args: cosine refuses",
        ),
        (
            {"lr_scheduler": "reduce_lr_on_plateau", "lr_scheduler_args": ["no_such=1"]},
            "--lr_scheduler_args: reduce_lr_on_plateau has no argument 'no_such'; it takes mode, factor, patience",
        ),
        (
            {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["T_max=1"]},
            "--lr_scheduler_args: StepLR has no argument 'T_max'; it takes step_size, gamma",
        ),
        ({"lr_scheduler_type": "StepLR"}, "--lr_scheduler_args: StepLR refuses no arguments: "),
        ({"lr_scheduler_type": "StepLL"}, "--lr_scheduler_type: torch.optim.lr_scheduler has no class 'StepLL'"),
        ({"lr_scheduler_type": "torch.nn.Linear"}, "--lr_scheduler_type: torch.nn.Linear is no torch.optim.lr_sch"),
        ({"lr_scheduler_type": "nowhere.X"}, "--lr_scheduler_type: nowhere.X cannot be imported"),
        (
            {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ["max_lr=1", "total_steps=5"]},
            "--lr_scheduler_args: OneCycleLR ends after 5 steps, the run has 20",
        ),
    ],
)
def test_mistakes_are_named_in_one_line(changes, said):
    with pytest.raises(UserError) as caught:
        rates(options(**changes), 20)
    (line,) = caught.value.problems
    assert line.startswith(said)
    assert "\n" not in line


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rate", [0.0, 1e-4, -1e-4])
def test_a_dry_run_takes_what_a_run_takes_and_warns_of_nothing(rate):
    one_cycle = ["max_lr=1", "total_steps=20"]
    dry_run(options(lr_scheduler="polynomial", learning_rate=rate))
    dry_run(options(lr_scheduler_type="OneCycleLR", lr_scheduler_args=one_cycle, learning_rate=rate), 20)
    dry_run(options(lr_scheduler="cosine", lr_warmup_steps=20, learning_rate=rate), 20)


def test_a_dry_run_finds_mistakes_where_the_schedule_counts():
    wrong = {"lr_scheduler": "cosine", "lr_scheduler_args": ["no_such=1"]}
    with pytest.raises(UserError, match="cosine refuses"):
        dry_run(options(**wrong))
    with pytest.raises(UserError, match="exceed the 20 steps"):
        dry_run(options(lr_scheduler="warmup_stable_decay", lr_warmup_steps=11, lr_decay_steps=10), 20)
    dry_run(options(**wrong, optimizer_type="AdaFactor"))
    dry_run(options(**wrong, optimizer_type="AdamWScheduleFree"))
