"""References: the published check values, and the definitions in float64 at every timestep."""

from __future__ import annotations

import pytest
import torch

from library.objectives import ddpm, weighting

SNR = ddpm.signal_to_noise(ddpm.alpha_bars(ddpm.scaled_linear_betas()))
CHECKED = SNR[[0, 500, 999]].float()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (weighting.min_snr(CHECKED, 5.0, "epsilon"), [0.004254, 1.0, 1.0]),
        (weighting.min_snr(CHECKED, 5.0, "v_prediction"), [0.004250, 0.27633, 0.00466]),
        (weighting.v_like_epsilon(CHECKED), [0.99900, 0.27633, 0.00466]),
        (weighting.debiased(CHECKED, "epsilon"), [0.03162, 1.61828, 14.61465]),
        (weighting.debiased(CHECKED, "v_prediction"), [0.000999, 0.72367, 0.99534]),
        (weighting.epsilon_like_v(CHECKED, 0.1), [1.1001, 1.36188, 22.4588]),
    ],
)
def test_published_values(weights, expected):
    # Rounded to the last place printed: half of 1e-6 in the smallest, half of 1e-5 in the others.
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=3e-5, atol=6e-6)
    torch.testing.assert_close(weights[:1], torch.tensor(expected[:1]), rtol=2e-4, atol=0)


def test_definitions_at_every_timestep():
    s, capped = SNR.tolist(), [min(x, 1000.0) for x in SNR.tolist()]
    definitions = {
        "min_snr": (weighting.min_snr(SNR.float(), 5.0, "epsilon"), [min(x, 5) / x for x in s]),
        "min_snr_v": (weighting.min_snr(SNR.float(), 5.0, "v_prediction"), [min(x, 5) / (x + 1) for x in s]),
        "v_like_epsilon": (weighting.v_like_epsilon(SNR.float()), [x / (x + 1) for x in capped]),
        "epsilon_like_v": (weighting.epsilon_like_v(SNR.float(), 0.3), [1 + 0.3 * (x + 1) / x for x in capped]),
        "debiased": (weighting.debiased(SNR.float(), "epsilon"), [x**-0.5 for x in capped]),
        "debiased_v": (weighting.debiased(SNR.float(), "v_prediction"), [1 / (x + 1) for x in capped]),
    }
    for name, (ours, expected) in definitions.items():
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=0, msg=lambda m, name=name: f"{name}: {m}")
