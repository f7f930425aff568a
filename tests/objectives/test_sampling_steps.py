"""The objectives' sampling steps equal those of diffusers' schedulers, from the same numbers (float32, 1e-5)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from library.objectives import ddpm
from library.objectives.flow import FlowObjective, FlowSettings
from library.objectives.objective import DdpmObjective
from tests.builders.options import options_for

SHAPE = (2, 4, 8, 8)
STEPS = 7


def opts(**given):
    return options_for("sd", "network", **given)


def prediction(number):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + number))


def walked(objective, shift=1.0):
    """Latents before each step, all from one stream."""
    rng = torch.Generator().manual_seed(1)
    latents = objective.noise(torch.zeros(SHAPE), rng)
    times, found = objective.sampling_times(STEPS, shift), [latents]
    for step in range(STEPS - 1):
        now, then = times[step].expand(2), times[step + 1].expand(2)
        found.append(objective.step_back(found[-1], prediction(step), now, then, rng))
    return times, found


@pytest.mark.parametrize(("kind", "zero"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)])
def test_ancestral_steps(kind, zero):
    given = opts(zero_terminal_snr=zero)
    times, ours = walked(DdpmObjective(kind, given.noise, given.loss))
    scheduler = DDPMScheduler(
        beta_start=ddpm.BETA_START,
        beta_end=ddpm.BETA_END,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=kind,
        rescale_betas_zero_snr=zero,
    )
    scheduler.set_timesteps(timesteps=times.tolist())
    rng = torch.Generator().manual_seed(1)
    latents = torch.randn(SHAPE, generator=rng)
    for step, time in enumerate(scheduler.timesteps[:-1]):
        latents = scheduler.step(prediction(step), time, latents, generator=rng).prev_sample
        # the first step divides by a signal of 0.07 (epsilon), so that latents are of order 10
        assert torch.allclose(latents, ours[step + 1], atol=1e-5, rtol=1e-5), step


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_steps_along_a_velocity(shift):
    given = opts()
    objective = FlowObjective(FlowSettings("uniform"), given.noise, given.loss)
    times, ours = walked(objective, shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))
    assert torch.allclose(times, scheduler.timesteps, atol=1e-3)
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    for step, time in enumerate(scheduler.timesteps[:-1]):
        latents = scheduler.step(prediction(step), time, latents).prev_sample
        assert torch.allclose(latents, ours[step + 1], atol=1e-5)


def test_times_begin_at_pure_noise_and_fall_evenly():
    given = opts()
    times = DdpmObjective("epsilon", given.noise, given.loss).sampling_times(40).tolist()
    assert times == [999 - 25 * step for step in range(40)]


def test_the_first_noise_has_the_offset_that_training_adds():
    given = opts(noise_offset=2.0)
    objective = DdpmObjective("epsilon", given.noise, given.loss)
    noise = objective.noise(torch.zeros(64, 4, 8, 8), torch.Generator().manual_seed(1))
    means = noise.mean((2, 3)).std()
    assert 1.5 < means < 2.5
    plain = objective.__class__("epsilon", opts().noise, given.loss).noise(torch.zeros(64, 4, 8, 8), torch.Generator())
    assert plain.mean((2, 3)).std() < 0.3
