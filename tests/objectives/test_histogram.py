"""The histogram of --show_timesteps against closed forms of what is drawn and of the weights."""

from __future__ import annotations

import math

import pytest
import torch

from library.objectives.flow import FlowObjective, FlowSettings
from library.objectives.histogram import DRAWS, histogram
from library.objectives.objective import DdpmObjective
from library.options.loss import LossOptions, NoiseOptions
from tests.builders.options import options_with

NOISE = 5 / math.sqrt(DRAWS)  # shares of a million draws, five deviations and more


def flow(sampling, **settings) -> FlowObjective:
    opts = options_with(NoiseOptions, LossOptions)
    return FlowObjective(FlowSettings(sampling, **settings), opts.noise, opts.loss)


@pytest.mark.rows("R503")
def test_shares_are_those_of_the_distribution_and_of_the_offset():
    bins = histogram(flow("shift", shift=3.0, sigmoid_scale=2.0), (8, 8), 20, offset=-0.5)

    def below(timestep: float) -> float:
        sigma = torch.tensor(timestep / 1000, dtype=torch.float64)
        plain = sigma / (3 - 2 * sigma)  # the y of 3 y / (1 + 2 y)
        return float(torch.special.ndtr(plain.logit() / 2 + 0.5))

    assert [(one.start, one.end) for one in bins] == [(50 * number, 50 * number + 50) for number in range(20)]
    for one in bins:
        assert one.share == pytest.approx(below(one.end) - below(one.start), abs=NOISE)
    assert sum(one.share for one in bins) == pytest.approx(1)
    assert {one.weight for one in bins} == {1.0}


@pytest.mark.rows("R503")
def test_the_size_decides_where_it_decides_in_training():
    seen = []
    histogram(flow("flux_shift", shift_of=lambda *size: seen.append(size) or 2.0), (64, 96), 10)
    assert seen == [(64, 96)]


@pytest.mark.rows("R503")
def test_weights_are_means_over_what_is_drawn():
    bins = histogram(flow("uniform", weighting_scheme="cosmap", prediction="sigma_scaled"), (8, 8), 10)
    for one in bins:  # the integral of 2 / (pi (1 - 2 s + 2 s^2)) is 2 / pi atan(2 s - 1)
        mean = 2 / math.pi * (math.atan(one.end / 500 - 1) - math.atan(one.start / 500 - 1)) * 10
        assert one.weight == pytest.approx(mean, rel=1e-3)
        assert one.weighed == pytest.approx(mean / 10, abs=NOISE)  # the whole of it is 1


@pytest.mark.rows("R503")
def test_noise_prediction_and_a_range_of_timesteps():
    opts = options_with(NoiseOptions, LossOptions, max_timestep=500, min_snr_gamma=5.0)
    bins = histogram(DdpmObjective("epsilon", opts.noise, opts.loss), (8, 8), 1000)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    snr = alphas / (1 - alphas)
    assert [one.weight for one in bins[500:]] == [None] * 500
    expected = (5 / snr[:500]).clamp(max=1).tolist()
    assert [one.weight for one in bins[:500]] == pytest.approx(expected, rel=1e-4)
    assert bins[3].share == pytest.approx(1 / 500, abs=NOISE)
