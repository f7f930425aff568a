"""Rates against closed formulas, computed here."""

import math
import types

import pytest
import torch

from library.errors import UserError
from library.training.lr_schedules import as_steps, make_schedule


def options(**changes):
    values = {
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "lr_decay_steps": 0,
        "lr_scheduler_num_cycles": 1,
        "lr_scheduler_power": 1.0,
        "lr_scheduler_timescale": None,
        "lr_scheduler_min_lr_ratio": None,
    }
    return types.SimpleNamespace(**{**values, **changes})


def rates(chosen, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, chosen, total)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


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
