"""References: the formulas in plain float64, and the published check values."""

from __future__ import annotations

import math

import pytest
import torch

from library.objectives import ddpm, losses

T = torch.tensor([0, 500, 999])
ALPHA_BAR = ddpm.alpha_bars(ddpm.scaled_linear_betas())[T].float()


def reference(kind: str, d: float, c: float) -> float:
    return {
        "l2": d * d,
        "l1": abs(d),
        "huber": 2 * c * (math.sqrt(d * d + c * c) - c),
        "smooth_l1": 2 * (math.sqrt(d * d + c * c) - c),
    }[kind]


@pytest.mark.rows("R258")
@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1"])
def test_pointwise_losses_match_their_formulas(kind):
    differences = [-3.0, -0.5, 0.0, 0.01, 0.1, 1.0, 10.0]
    target = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d = torch.tensor(differences, dtype=torch.float64)
    c = torch.tensor([0.1, 2.0])
    ours = losses.pointwise((target + d).float(), target.float(), kind, c)
    expected = torch.tensor([[reference(kind, x, float(ci)) for x in differences] for ci in c])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)  # differences of float32 numbers near 1


def test_huber_types_have_the_published_values():
    one, zero, c = torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([0.1])
    assert losses.pointwise(one, zero, "huber", c).item() == pytest.approx(0.180998, abs=1e-6)
    assert losses.pointwise(one, zero, "smooth_l1", c).item() == pytest.approx(1.809975, abs=1e-6)


@pytest.mark.rows("R259")
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.2, 0.2, 0.2]),
        ("exponential", [2.0, 0.63246, 0.20046]),
        ("snr", [2 * 0.94971, 2 * 0.23128, 2 * 0.10369]),  # published without the scale, which we apply
    ],
)
def test_switch_points_have_the_published_values(schedule, expected):
    c = losses.huber_switch_point(schedule, T, ALPHA_BAR, huber_c=0.1, scale=2.0, horizon=1000)
    torch.testing.assert_close(c, torch.tensor(expected), rtol=0, atol=1.2e-5)  # rounded to 5 places


def test_snr_switch_point_matches_its_definition_at_every_timestep():
    alpha_bar = ddpm.alpha_bars(ddpm.scaled_linear_betas())
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    expected = (1 - 0.3) / (1 + sigma) ** 2 + 0.3
    t = torch.arange(1000)
    ours = losses.huber_switch_point("snr", t, alpha_bar.float(), huber_c=0.3, scale=1.0, horizon=1000)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-6, atol=0)


def test_snr_switch_point_is_finite_without_signal():
    c = losses.huber_switch_point("snr", T[:1], torch.zeros(1), huber_c=0.1, scale=1.0, horizon=1000)
    assert c.item() == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_huber_gradients_stay_finite_at_zero_difference(kind):
    prediction = torch.zeros(1, 4, requires_grad=True)
    losses.pointwise(prediction, torch.zeros(1, 4), kind, torch.tensor([1e-3])).sum().backward()
    assert torch.equal(prediction.grad, torch.zeros(1, 4))
