"""Images of flow models. Reference: velocities known in closed form, and diffusers' own shift and scheduler."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from library.inference.generate import generate, sample_latents
from library.inference.images import png_text
from library.inference.prompts import SamplePrompt, parse_prompt
from library.inference.samplers import make_flow_scheduler
from library.types import Models, TextCond

CPU = torch.device("cpu")
PROMPT = SamplePrompt("0.5", "-1", 64, 96, 7, 8, 1.0, "euler")


def shift_by_size(height: int, width: int) -> float:
    """exp(mu) of diffusers' own mu, which counts patches of 2 x 2 latents."""
    return math.exp(calculate_shift((height // 2) * (width // 2)))


@pytest.fixture
def make(make_family, traits):
    """A family whose velocity is known: a prompt is a number m, and clean latents are N(m, deviation²)."""

    class FlowFamily(make_family):
        def __init__(self, deviation: float = 0.0, shift=shift_by_size):
            super().__init__("flow")
            self.traits = replace(traits, objective="flow", flow_shift=shift)
            self.deviation, self.times, self.told = deviation, [], []

        def encode_text(self, models, captions, *, emphasis=None):
            return TextCond({"mean": torch.tensor([float(text) for text in captions])})

        def predict(self, models, noisy, timesteps, cond, batch=None):
            self.times.append(timesteps.tolist())
            self.told.append(batch.guidance)
            # With x = (1-s) clean + s noise, E[noise - clean | x] is linear in x: plain Gaussian conditioning.
            s, mean = (timesteps / 1000).view(-1, 1, 1, 1), cond.tensors["mean"].view(-1, 1, 1, 1)
            variance = (1 - s) ** 2 * self.deviation**2 + s**2
            return (s - (1 - s) * self.deviation**2) / variance * (noisy - (1 - s) * mean) - mean

        def decode_latents(self, models, latents):
            return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)

    return FlowFamily


MODELS = Models(denoiser=torch.nn.Identity(), text_encoders={}, tokenizers={}, vae=None)


def start(prompt: SamplePrompt, family) -> torch.Tensor:
    generator = torch.Generator().manual_seed(prompt.seed)
    channels = family.traits.latent_channels
    return torch.randn(1, channels, prompt.height // 8, prompt.width // 8, generator=generator)


# --- where sampling arrives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_a_single_image_is_reached_in_any_number_of_steps(make, steps):
    """All paths lead straight to it, so that even one Euler step is exact; a wrong sign, scale or end would miss."""
    latents = sample_latents(make(), MODELS, [replace(PROMPT, steps=steps)], CPU)
    assert latents.shape == (1, 4, 12, 8)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, torch.full_like(latents, 0.5), rtol=0, atol=1e-5)  # float32 sums


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_steps_converge_to_the_exact_flow_of_a_gaussian(make, shift):
    """The flow carries quantiles to quantiles: noise z ends at m + d z. Euler's error halves as the steps double."""
    prompt, deviation = replace(PROMPT, flow_shift=shift), 0.3
    family = make(deviation)
    exact = 0.5 + deviation * start(prompt, family)
    errors = []
    for steps in (100, 200, 400):
        errors.append((sample_latents(family, MODELS, [replace(prompt, steps=steps)], CPU) - exact).abs().max().item())
    assert errors[-1] < 0.02
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.05)
    assert errors[2] / errors[1] == pytest.approx(0.5, abs=0.05)


def test_guidance_by_a_negative_prompt(make):
    """For single images the guided velocity is that of the single image n + scale * (p - n)."""
    family = make()
    latents = sample_latents(family, MODELS, [replace(PROMPT, scale=3.0, steps=5)], CPU)
    torch.testing.assert_close(latents, torch.full_like(latents, -1 + 3.0 * 1.5), rtol=0, atol=1e-5)
    assert {len(times) for times in family.times} == {2}
    family = make()
    sample_latents(family, MODELS, [PROMPT], CPU)
    assert {len(times) for times in family.times} == {1}


def test_the_batch_does_not_change_an_image(make):
    prompts = [replace(PROMPT, prompt=text, seed=seed) for text, seed in (("0.5", 1), ("-2", 2))]
    together = sample_latents(make(0.3), MODELS, prompts, CPU)
    alone = torch.cat([sample_latents(make(0.3), MODELS, [prompt], CPU) for prompt in prompts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(256, 256), (512, 512), (1024, 1024), (832, 1216), (1360, 768)])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_the_schedule_is_that_of_diffusers_pipeline(make, width, height, steps):
    """As the pipeline does it: mu from the number of patches, dynamic shifting by exp(mu)."""
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = calculate_shift((height // 16) * (width // 16))
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    family = make()
    sample_latents(family, MODELS, [replace(PROMPT, width=width, height=height, steps=steps)], CPU)
    actual = torch.tensor(family.times).flatten()
    torch.testing.assert_close(actual, theirs.timesteps, rtol=1e-6, atol=0)  # two forms of one formula, float32
    ours = make_flow_scheduler(steps=steps, shift=math.exp(mu))
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=0)
    assert ours.sigmas[0] == 1
    assert ours.sigmas[-1] == 0


def test_a_fixed_shift_by_its_definition(make):
    family = make(shift=lambda height, width: 3.0)
    sample_latents(family, MODELS, [replace(PROMPT, steps=4)], CPU)
    levels = (1, 3 / 4, 2 / 4, 1 / 4)
    assert torch.tensor(family.times).flatten().tolist() == pytest.approx(
        [1000 * 3 * level / (1 + 2 * level) for level in levels]
    )


def test_the_familys_shift_is_given_height_then_width(make):
    seen = []
    family = make(shift=lambda *size: seen.append(size) or 1.0)
    sample_latents(family, MODELS, [PROMPT], CPU)
    assert seen == [(12, 8)]


def test_a_prompt_may_bring_its_own_shift(make):
    family = make()
    prompt = parse_prompt("0.5 --l 1 --fs 6 --s 2 --d 1 --w 64 --h 64", family.traits, "ddim")
    sample_latents(family, MODELS, [prompt], CPU)
    assert torch.tensor(family.times).flatten().tolist() == pytest.approx([1000, 1000 * 6 * 0.5 / (1 + 5 * 0.5)])


def test_a_family_without_a_shift_has_equal_steps(make):
    family = make(shift=None)
    sample_latents(family, MODELS, [replace(PROMPT, steps=4)], CPU)
    assert torch.tensor(family.times).flatten().tolist() == pytest.approx([1000, 750, 500, 250])


@pytest.mark.parametrize("steps", [1, 3, 1000])
@pytest.mark.parametrize("shift", [1e-3, 1.0, 1e3])
def test_any_number_of_steps_and_any_shift_are_finite_and_go_down(make, steps, shift):
    scheduler = make_flow_scheduler(steps=steps, shift=shift)
    assert len(scheduler.timesteps) == steps
    assert (scheduler.sigmas.diff() <= 0).all()
    prompt = replace(PROMPT, steps=steps, flow_shift=shift)
    latents = sample_latents(make(), MODELS, [prompt], CPU)
    torch.testing.assert_close(latents, torch.full_like(latents, 0.5), rtol=0, atol=1e-3)  # 1000 float32 steps


# --- what the denoiser is told ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_embedded_guidance_is_passed_on(make, scale):
    family = make()
    prompt = parse_prompt(f"0.5 --n -1 --g 2.25 --s 2 --w 64 --h 64 --d 1 --l {scale}", family.traits, "ddim")
    sample_latents(family, MODELS, [prompt], CPU)
    assert family.told == [2.25, 2.25]
    family = make()
    sample_latents(family, MODELS, [PROMPT], CPU)
    assert set(family.told) == {None}


def test_prompts_with_other_guidance_or_shift_are_made_apart(make):
    family = make()
    prompts = [
        replace(PROMPT, steps=1, **changes)
        for changes in ({}, {"seed": 8}, {"guidance": 2.0}, {"guidance": 3.0}, {"guidance": 3.0, "flow_shift": 2.0})
    ]
    images = generate(family, MODELS, prompts, "cpu", batch_size=8)
    assert [len(times) for times in family.times] == [2, 1, 1, 1]
    assert family.told == [None, 2.0, 3.0, 3.0]
    assert [image.getpixel((0, 0)) for image in images] == [(191, 191, 191)] * 5  # 0.5 of [-1, 1]


def test_the_zero_terminal_schedule_of_other_models_changes_nothing(make):
    plain, other = make(0.3), make(0.3)
    one = sample_latents(plain, MODELS, [PROMPT], CPU)
    assert torch.equal(one, sample_latents(other, MODELS, [PROMPT], CPU, zero_terminal_snr=True))


def test_an_image_shows_its_guidance_and_shift():
    text = png_text(replace(PROMPT, guidance=3.5, flow_shift=2.0))
    assert (text["guidance"], text["flow-shift"], text["sampler"]) == ("3.5", "2.0", "euler")
    assert {"guidance", "flow-shift"}.isdisjoint(png_text(PROMPT))


# --- other samplers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["heun", "dpmsolver++"])
def test_samplers_of_second_order_are_closer_than_euler(make, sampler):
    """The flow carries quantiles to quantiles, see above. Heun's error is a quarter where there are twice the steps.

    That of DPM++ is not, as its first level is a thousandth below that of the noise, and its last step is Euler's.
    """
    prompt, deviation = replace(PROMPT, flow_shift=3.0, sampler=sampler), 0.6
    family = make(deviation)
    exact = 0.5 + deviation * start(prompt, family)
    errors = []
    for steps in (20, 40):
        errors.append((sample_latents(family, MODELS, [replace(prompt, steps=steps)], CPU) - exact).abs().max().item())
    euler = sample_latents(family, MODELS, [replace(prompt, sampler="euler", steps=40)], CPU)
    assert errors[1] < 0.3 * (euler - exact).abs().max()
    if sampler == "heun":
        assert math.log2(errors[0] / errors[1]) > 1.7


def test_every_sampler_shares_the_noise_levels(make):
    heun, dpm = (make_flow_scheduler(name, steps=5, shift=3.0) for name in ("heun", "dpmsolver++"))
    euler = make_flow_scheduler(steps=5, shift=3.0)
    assert heun.sigmas[1::2].tolist() == pytest.approx(euler.sigmas[1:].tolist())
    assert len(heun.timesteps) == 2 * 5 - 1
    # It begins a thousandth below 1, before the shift, and goes to 0 in equal parts as well.
    levels = [0.999 * (1 - step / 5) for step in range(6)]
    assert dpm.sigmas.tolist() == pytest.approx([3 * level / (1 + 2 * level) for level in levels])
    assert dpm.timesteps.tolist() == pytest.approx([1000 * sigma for sigma in dpm.sigmas[:-1].tolist()])


@pytest.mark.parametrize("sampler", ["heun", "dpmsolver++"])
@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_other_samplers_take_any_number_of_steps(make, sampler, steps):
    done = []
    prompt = replace(PROMPT, sampler=sampler, steps=steps, width=64, height=64)
    latents = sample_latents(make(), MODELS, [prompt], CPU, progress=done.append)
    torch.testing.assert_close(latents, torch.full_like(latents, 0.5), rtol=0, atol=1e-2)
    assert sum(done) == steps
