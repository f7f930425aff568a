"""The sizes of latents that grow, and the step that enlarges them, by its formula and by OpenCV's blur."""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from library.families.sd.adapter import SdFamily
from library.inference.generate import sample_latents
from library.inference.gradual_latent import GradualLatent
from library.inference.growing import enlarging_step, sharpened, shrunk
from library.inference.prompts import SamplePrompt
from library.inference.samplers import make_scheduler
from tests.builders import sd_options, tiny_sd

CPU = torch.device("cpu")
FULL = (64, 48)
ON = GradualLatent(timesteps=750)


def times(steps: int) -> list[float]:
    return [999 * (1 - step / (steps - 1)) for step in range(steps)]


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_the_usual_growth():
    assert ON.smallest(FULL) == (32, 24)
    growth = ON.growth(times(20), FULL)
    found = [(step, size) for step, size in enumerate(growth) if size]
    assert found == [(5, (40, 24)), (8, (48, 32)), (11, (56, 40)), (14, (64, 48))]  # multiples of 8 on the way
    assert times(20)[4] > 750 > times(20)[5]


def test_other_parts_and_pauses():
    growth = replace(ON, ratio=0.25, ratio_step=0.375, every_n_steps=1).growth(times(10), (65, 33))
    assert [size for size in growth if size] == [(40, 16), (65, 33)]  # the last is as asked for, whatever divides it


def test_no_latent_becomes_smaller_on_its_way():
    growth = replace(ON, ratio=0.9, ratio_step=0.05, every_n_steps=1).growth(times(10), (15, 15))
    assert replace(ON, ratio=0.9).smallest((15, 15)) == (13, 13)
    assert [size for size in growth if size] == [(13, 13), (15, 15)]


def test_too_few_steps_still_end_at_the_full_size(caplog):
    with caplog.at_level("WARNING"):
        growth = ON.growth(times(4), FULL)
    assert growth[-1] == FULL
    assert "4 steps are too few to reach the full size in parts of 0.125" in caplog.text
    caplog.clear()
    assert replace(ON, ratio=1.0).growth(times(4), FULL) == [None] * 4
    assert not caplog.text


# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [(3.0, 0.5, 0.5, 1.0), (5.0, 1.5, 1.0)])
def test_sharpening_blurs_as_opencv_does(parameters):
    latents = torch.randn(2, 4, 12, 9, generator=torch.Generator().manual_seed(1))
    size, sigma, strength = int(parameters[0]), *parameters[1:3]
    how = {"sigmaX": sigma, "borderType": cv2.BORDER_REFLECT_101}
    blurred = [cv2.GaussianBlur(channel.numpy(), (size, size), **how) for channel in latents.flatten(0, 1)]
    expected = latents + strength * (latents - torch.from_numpy(np.stack(blurred)).view_as(latents))
    found = sharpened(latents, replace(ON, unsharp=parameters))
    assert (found - expected).abs().max() < 1e-5
    assert sharpened(latents, ON) is latents


def test_sharpening_of_latents_that_are_smaller_than_the_blur():
    flat = torch.ones(1, 4, 2, 2)
    assert (sharpened(flat, replace(ON, unsharp=(9.0, 2.0, 1.0))) - flat).abs().max() < 1e-5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("unsharp", [None, (3.0, 0.5, 0.5, 1.0), (3.0, 1.0, 1.0, 0.0)])
def test_an_enlarging_step(prediction_type, unsharp):
    """By the formulas of k-diffusion's ancestral step, with sizes changed after or before it."""
    gradual, generator = replace(ON, unsharp=unsharp, s_noise=0.7), torch.Generator().manual_seed(2)
    scheduler = make_scheduler("euler_a", steps=10, prediction_type=prediction_type)
    latents = 5 * torch.randn(2, 4, 8, 8, generator=generator)
    prediction = torch.randn(2, 4, 8, 8, generator=generator)
    timestep = scheduler.timesteps[0]
    scheduler.scale_model_input(latents, timestep)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    found = enlarging_step(scheduler, prediction, timestep, latents, (16, 12), gradual, generators)
    assert scheduler.step_index == 1

    now, after = scheduler.sigmas[0].double(), scheduler.sigmas[1].double()
    clean = latents - now * prediction
    if prediction_type == "v_prediction":
        clean = latents / (now**2 + 1) - prediction * now / (now**2 + 1).sqrt()
    slope = (latents - clean) / now
    added = torch.minimum(after, (after**2 * (now**2 - after**2) / now**2).sqrt())
    length = (after**2 - added**2).sqrt() - now

    def large(values: torch.Tensor) -> torch.Tensor:
        return interpolate(values, size=(16, 12), mode="bicubic", align_corners=False)

    def sharp(values: torch.Tensor) -> torch.Tensor:
        return sharpened(values.float(), gradual).double()

    if unsharp is None or unsharp[3]:
        expected = sharp(large(latents + slope * length))
    else:
        expected = sharp(large(latents.double())) + large(slope) * length
    noise = torch.stack([torch.randn(4, 16, 12, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    expected = expected + noise * added * 0.7
    assert (found - expected).abs().max() < 1e-3


def test_at_the_same_size_it_is_the_step_of_the_sampler():
    latents, prediction = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    made = []
    for enlarging in (True, False):
        scheduler, generator = make_scheduler("euler_a", steps=5, prediction_type="epsilon"), torch.Generator()
        generator.manual_seed(3)
        timestep = scheduler.timesteps[0]
        scheduler.scale_model_input(latents, timestep)
        if enlarging:
            made.append(enlarging_step(scheduler, prediction, timestep, latents, (8, 8), ON, [generator]))
        else:
            made.append(scheduler.step(prediction, timestep, latents, generator=[generator]).prev_sample)
    assert (made[0] - made[1]).abs().max() < 1e-4


def test_latents_at_the_beginning():
    noise = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(1))
    expected = interpolate(noise, scale_factor=0.5, mode="bicubic", align_corners=False)
    assert (shrunk(noise, ON) - expected).abs().max() < 1e-6


# --- whole images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler_a", "k_euler"])
def test_images(sampler):
    family, models = SdFamily(sd_options("")), tiny_sd()
    prompt = SamplePrompt(
        "a cat", "", 64, 96, 1, 6, 1.0, sampler, gradual=replace(ON, every_n_steps=1, ratio_step=0.25)
    )
    seen: list[tuple[int, ...]] = []

    def denoise(noisy, timesteps, cond, batch):
        seen.append(tuple(noisy.shape[-2:]))
        return family.denoiser.predict(models, noisy, timesteps, cond, batch)

    latents = sample_latents(family, models, [prompt, replace(prompt, seed=2)], CPU, denoise=denoise)
    assert latents.shape == (2, 4, 12, 8)
    assert seen == [(6, 4), (6, 4), (6, 4), (8, 4), (12, 8), (12, 8)]
    assert math.isfinite(latents.abs().max().item())
    alone = sample_latents(family, models, [replace(prompt, seed=2)], CPU)
    assert (latents[1:] - alone).abs().max() < 1e-3  # the batch changes nothing
