"""References: published check values, plain float64 loops, and diffusers' DDPMScheduler."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from library.objectives import ddpm

CHECKED = [0, 500, 999]


def reference_alpha_bar() -> list[float]:
    low, high, product, values = math.sqrt(0.00085), math.sqrt(0.012), 1.0, []
    for i in range(1000):
        product *= 1 - (low + (high - low) * i / 999) ** 2
        values.append(product)
    return values


def scheduler(prediction_type: str = "epsilon", **kwargs) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type, **kwargs
    )


def test_alpha_bar_is_the_product_of_its_definition():
    ours = ddpm.alpha_bars(ddpm.scaled_linear_betas())
    torch.testing.assert_close(ours, torch.tensor(reference_alpha_bar(), dtype=torch.float64), rtol=1e-12, atol=0)


def test_snr_has_the_published_values():
    snr = ddpm.signal_to_noise(ddpm.alpha_bars(ddpm.scaled_linear_betas()))[CHECKED]
    # The published values come from float32, where 1 - alpha_bar cancels at t = 0 (2.6e-5), and are rounded.
    torch.testing.assert_close(
        snr, torch.tensor([1175.44, 0.38185, 0.004682], dtype=torch.float64), rtol=1.2e-4, atol=0
    )


def test_zero_terminal_has_the_published_values_and_ends_in_pure_noise():
    fixed = ddpm.zero_terminal(ddpm.alpha_bars(ddpm.scaled_linear_betas()))
    torch.testing.assert_close(
        fixed[CHECKED], torch.tensor([0.99915, 0.24102, 0.0], dtype=torch.float64), rtol=0, atol=5e-6
    )
    assert fixed[-1] == 0


def test_zero_terminal_matches_diffusers():
    fixed = ddpm.zero_terminal(ddpm.alpha_bars(ddpm.scaled_linear_betas()))
    theirs = scheduler(rescale_betas_zero_snr=True).alphas_cumprod
    # float32 products of 1000 factors on their side
    torch.testing.assert_close(fixed.float(), theirs, rtol=1e-4, atol=1e-6)


def test_betas_of_inverts_alpha_bars():
    betas = ddpm.scaled_linear_betas()
    torch.testing.assert_close(ddpm.betas_of(ddpm.alpha_bars(betas)), betas, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("function", ["add_noise", "velocity"])
def test_noisy_latents_and_v_target_match_diffusers(function):
    rng = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, 6, 5, generator=rng)
    t = torch.tensor([0, 333, 666, 999])
    alpha_bar = ddpm.alpha_bars(ddpm.scaled_linear_betas()).float()[t]
    ours = getattr(ddpm, function)(latents, noise, alpha_bar)
    reference = scheduler()
    theirs = (reference.add_noise if function == "add_noise" else reference.get_velocity)(latents, noise, t)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)  # their table is float32 throughout
