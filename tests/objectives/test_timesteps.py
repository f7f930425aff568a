from __future__ import annotations

import pytest
import torch

from library.errors import UserError
from library.objectives import timesteps


def draw(span: timesteps.TimestepRange, count: int = 20000) -> torch.Tensor:
    return timesteps.uniform(count, span, torch.Generator().manual_seed(0))


def test_the_whole_range_is_uniform():
    drawn = draw(timesteps.timestep_range(None, None))
    assert drawn.dtype == torch.int64
    assert drawn.min() == 0
    assert drawn.max() == 999
    tenths = torch.bincount(drawn // 100, minlength=10)
    assert ((tenths - 2000).abs() < 220).all()  # five deviations of a binomial count


def test_the_range_is_half_open():
    assert draw(timesteps.timestep_range(100, 103)).unique().tolist() == [100, 101, 102]
    assert draw(timesteps.timestep_range(None, 2)).unique().tolist() == [0, 1]
    assert draw(timesteps.timestep_range(998, None)).unique().tolist() == [998, 999]


def test_equal_ends_mean_that_timestep():
    assert draw(timesteps.timestep_range(500, 500)).unique().tolist() == [500]


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [(600, 400, "above"), (-1, None, "--min_timestep"), (1000, None, "--min_timestep"), (None, 1001, "--max_timestep")],
)
def test_impossible_ranges_are_refused(low, high, message):
    with pytest.raises(UserError, match=message):
        timesteps.timestep_range(low, high)


def test_validation_timesteps_are_the_inner_points_of_six():
    assert timesteps.validation_timesteps(timesteps.timestep_range(None, None)) == [200, 400, 600, 800]
    assert timesteps.validation_timesteps(timesteps.timestep_range(500, 1000)) == [600, 700, 800, 900]
