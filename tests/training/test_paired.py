"""Paired differences against what numpy and scipy say of them, and where a run stands."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from library.training.paired import Comparison, difference


def test_in_one_stratum_it_is_the_paired_test_of_statistics():
    rng = np.random.default_rng(1)
    before = rng.normal(1.0, 0.5, 40)
    now = before - 0.01 + rng.normal(0, 0.02, 40)
    found = difference(torch.tensor(now), torch.tensor(before), torch.zeros(40, dtype=torch.long))
    assert found.mean == pytest.approx((now - before).mean(), rel=1e-12)
    assert found.error == pytest.approx(stats.sem(now - before), rel=1e-12)
    assert found.mean / found.error == pytest.approx(stats.ttest_rel(now, before).statistic, rel=1e-9)


def test_that_strata_differ_is_no_error():
    """Two strata of unequal size, by the textbook: W_h² s_h² / n_h, summed."""
    differences = torch.tensor([1.0, 1.2, 1.1, 9.0, 9.4], dtype=torch.float64)
    strata = torch.tensor([0, 0, 0, 1, 1])
    found = difference(differences, torch.zeros(5), strata)
    variance = (3 / 5) ** 2 * 0.01 / 3 + (2 / 5) ** 2 * 0.08 / 2
    assert found == pytest.approx((4.34, math.sqrt(variance)), rel=1e-9)
    assert found.error < 0.1 < stats.sem(differences.numpy())


def test_the_error_is_that_of_many_repetitions():
    """The deviation of the mean over many draws of noise, where timesteps have very different losses."""
    generator = torch.Generator().manual_seed(3)
    scale = torch.tensor([4.0, 2.0, 1.0, 0.5]).repeat_interleave(2)
    draws = scale + 0.1 * scale * torch.randn(4000, 8, generator=generator)
    strata = torch.arange(4).repeat_interleave(2)
    found = [difference(draw, torch.zeros(8), strata) for draw in draws]
    variance = float(draws.mean(1).var())
    assert np.mean([one.error**2 for one in found]) == pytest.approx(variance, rel=0.06)


def test_strata_with_one_look_are_joined_with_their_neighbours():
    differences = torch.tensor([1.0, 3.0, 10.0, 11.0], dtype=torch.float64)
    pairs = difference(differences, torch.zeros(4), torch.arange(4))
    assert pairs == difference(differences, torch.zeros(4), torch.tensor([0, 0, 1, 1]))
    assert pairs.error == pytest.approx(math.sqrt((2 * 2.0 + 2 * 0.5) / 16))
    three = difference(differences[:3], torch.zeros(3), torch.arange(3))
    assert three.error == pytest.approx(stats.sem(differences[:3].numpy()))


def test_one_look_has_no_error():
    found = difference(torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([0]))
    assert found == (-1.0, math.inf)


STRATA = torch.zeros(4, dtype=torch.long)
FIRST = torch.tensor([1.0, 2.0, 3.0, 4.0])


def updated(comparison: Comparison, change: list[float]) -> bool:
    return comparison.update(FIRST + torch.tensor(change), STRATA).lowest


def test_better_is_what_is_lower_by_more_than_the_error_of_the_difference():
    comparison = Comparison()
    comparison.begin(FIRST, "points")
    assert updated(comparison, [-0.1, -0.1, -0.1, -0.12]) is True
    assert comparison.since == 0
    assert updated(comparison, [-0.1, -0.11, -0.1, -0.12]) is True, "the lowest, though within the error"
    assert comparison.since == 1
    assert updated(comparison, [-0.4, 0.2, -0.3, 0.07]) is False
    assert comparison.since == 2
    assert updated(comparison, [-0.2, -0.2, -0.2, -0.3]) is True
    assert comparison.since == 0
    assert comparison.lowest == comparison.latest == pytest.approx(2.275)


def test_the_base_is_what_has_to_be_improved_and_no_copy():
    comparison = Comparison()
    comparison.begin(FIRST, "points")
    assert updated(comparison, [0.1, 0.1, 0.1, 0.1]) is True, "the lowest of what has been trained"
    assert comparison.since == 1
    assert updated(comparison, [0.0, 0.0, 0.0, 0.0]) is True
    assert comparison.since == 2
    assert updated(comparison, [math.nan] * 4) is False
    assert comparison.since == 3


def test_it_travels_in_a_state_and_others_are_not_compared(tmp_path):
    comparison = Comparison()
    comparison.begin(FIRST, "points")
    updated(comparison, [-0.1, -0.1, -0.1, -0.12])
    updated(comparison, [0.1, 0.1, 0.1, 0.1])
    torch.save(comparison.state_dict(), tmp_path / "extra.bin")
    other = Comparison()
    other.load_state_dict(torch.load(tmp_path / "extra.bin", weights_only=True))
    assert torch.equal(other.base, comparison.base)
    assert torch.equal(other.best, comparison.best)
    assert (other.points, other.since, other.latest) == ("points", 1, comparison.latest)
    earlier = {"lowest": 0.1, "latest": 0.2, "since": 3}
    other.load_state_dict(earlier)
    assert (other.base, other.points, other.since) == (None, "", 0)
