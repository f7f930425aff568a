"""When to validate, and when there is nothing better to come."""

from __future__ import annotations

import logging
import math

import pytest

from library.options.base import Given, build_options
from library.options.sampling import ValidationOptions
from library.training.validation import BestLoss, Validation


def moments(data, steps, **given):
    opts = build_options([ValidationOptions], {name: Given(value, "command line") for name, value in given.items()})
    validation = Validation(opts, data, seed=1)
    per_step = [step for step in range(1, steps + 1) if validation.due(step)]
    per_epoch = [epoch for epoch in range(1, steps + 1) if validation.due(0, epoch)]
    return per_step, per_epoch


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ([], [1, 2, 3, 4, 5, 6])),
        ({"validate_every_n_steps": 2}, ([2, 4, 6], [])),
        ({"validate_every_n_epochs": 3}, ([], [3, 6])),
        ({"validate_every_n_steps": 4, "validate_every_n_epochs": 5}, ([4], [5])),
    ],
)
def test_moments(given, expected):
    assert moments(object(), 6, **given) == expected
    assert moments(None, 6, **given) == ([], [])


def test_the_best_is_remembered():
    best = BestLoss()
    assert [best.update(loss) for loss in (3.0, 2.0, 2.0, 2.5, 1.0)] == [True, True, False, False, True]
    best.update(4.0)
    other = BestLoss()
    other.load_state_dict(best.state_dict())
    assert (other.lowest, other.latest, other.since) == (1.0, 4.0, 1)
    other.restart()
    assert (other.lowest, other.since) == (math.inf, 0)


def test_nan_is_never_the_best():
    best = BestLoss()
    assert not best.update(math.nan)
    assert best.since == 1


def test_options_without_images_to_validate_with_are_reported(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("trainscripts"), "propagate", True)
    moments(None, 1, save_best_validation=True, early_stop_patience=3)
    (line,) = caplog.messages
    assert line.startswith("--save_best_validation, --early_stop_patience: has no effect, no images are kept")
    caplog.clear()
    moments(object(), 1, early_stop_patience=3)
    moments(None, 1)
    assert not caplog.messages
