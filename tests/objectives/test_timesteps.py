from __future__ import annotations

import torch

from library.objectives import timesteps


def draw(span: timesteps.TimestepRange, count: int = 20000) -> torch.Tensor:
    return timesteps.uniform(count, span, torch.Generator().manual_seed(0))


def test_the_whole_range_is_uniform():
    drawn = draw(timesteps.timestep_range(None, None))
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn, draw(timesteps.timestep_range(None, None)))
    assert drawn.min() == 0
    assert drawn.max() == 999
    tenths = torch.bincount(drawn // 100, minlength=10)
    assert ((tenths - 2000).abs() < 220).all()  # five deviations of a binomial count


def test_the_range_is_half_open():
    assert draw(timesteps.timestep_range(100, 103)).unique().tolist() == [100, 101, 102]
    assert draw(timesteps.timestep_range(None, 2)).unique().tolist() == [0, 1]
    assert draw(timesteps.timestep_range(998, None)).unique().tolist() == [998, 999]


def test_validation_timesteps_are_the_inner_points_of_six():
    assert timesteps.validation_timesteps(timesteps.timestep_range(None, None)) == [200, 400, 600, 800]
    assert timesteps.validation_timesteps(timesteps.timestep_range(500, 1000)) == [600, 700, 800, 900]
    assert timesteps.validation_timesteps(timesteps.timestep_range(0, 999)) == [199, 399, 599, 799]
