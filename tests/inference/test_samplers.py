from __future__ import annotations

import importlib.util

import diffusers
import pytest
import torch

from library.errors import UserError
from library.inference.prompts import SAMPLERS
from library.inference.samplers import make_scheduler
from library.objectives import ddpm

# As published with Stable Diffusion 1.x; other schedulers are derived from it by diffusers' own `from_config`.
SD_CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpm_2": diffusers.KDPM2DiscreteScheduler,
    "dpm_2_a": diffusers.KDPM2AncestralDiscreteScheduler,
    "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
}


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers with newer numpy
    pytest.mark.filterwarnings("ignore:.*algorithm_type.*:FutureWarning"),
]


def run(scheduler, denoise) -> torch.Tensor:
    """From a fixed start to the end, with a denoiser that is a function of (x, t)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    extras = {"generator": generator} if isinstance(scheduler, ANCESTRAL) else {}
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(scheduler.scale_model_input(x, t), t), t, x, **extras).prev_sample
    return x


ANCESTRAL = (diffusers.EulerAncestralDiscreteScheduler, diffusers.KDPM2AncestralDiscreteScheduler)


def wavy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.7 * x + 0.1 * torch.sin(3 * x + t / 300)


def best_epsilon(alpha_bar: torch.Tensor):
    """The ideal noise predictor where every clean latent is 0.5: images must come out as 0.5."""

    def denoise(x, t):
        low, high = int(t), min(int(t) + 1, 999)
        log_sigma = lambda i: 0.5 * torch.log((1 - alpha_bar[i]) / alpha_bar[i])  # noqa: E731
        sigma = torch.exp(torch.lerp(log_sigma(low), log_sigma(high), float(t) - low))
        signal = (1 + sigma**2).rsqrt()
        return (x - signal * 0.5) / (signal * sigma)

    return denoise


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", CLASSES)
def test_same_as_diffusers_own_conversion_of_the_published_config(name, prediction):
    theirs = CLASSES[name].from_config({**SD_CONFIG, "prediction_type": prediction})
    ours = make_scheduler(name, steps=7, prediction_type=prediction)
    theirs.set_timesteps(7)
    assert torch.equal(run(ours, wavy), run(theirs, wavy))


@pytest.mark.parametrize("name", ["lms", "euler", "euler_a", "dpm_2", "dpm_2_a"])
def test_k_names_are_the_plain_ones(name):
    plain, k = (make_scheduler(n, steps=4, prediction_type="epsilon") for n in (name, f"k_{name}"))
    assert (type(plain), dict(plain.config)) == (type(k), dict(k.config))


@pytest.mark.parametrize("name", [s for s in SAMPLERS if not s.startswith("k_")])
def test_an_ideal_denoiser_arrives_at_its_image(name):
    """Independent of diffusers' configurations: wrong betas, spacing or prediction type would miss."""
    alpha_bar = ddpm.alpha_bars(ddpm.scaled_linear_betas()).float()
    x = run(make_scheduler(name, steps=20, prediction_type="epsilon"), best_epsilon(alpha_bar))
    # Some samplers stop at the first timestep's sigma of 0.03 and keep a little of the noise.
    assert (x - 0.5).abs().max() < 0.12
    assert (x - 0.5).abs().mean() < 0.03


@pytest.mark.parametrize(
    ("steps", "zero_terminal"), [(1, False), (2, False), (5, False), (1, True), (3, True), (8, True)]
)
@pytest.mark.parametrize("name", [s for s in SAMPLERS if not s.startswith("k_")])
def test_any_number_of_steps_is_finite(name, steps, zero_terminal):
    scheduler = make_scheduler(name, steps=steps, prediction_type="v_prediction", zero_terminal_snr=zero_terminal)
    x = run(scheduler, lambda x, t: 0.3 * torch.sin(3 * x + t / 300))
    assert x.isfinite().all()
    assert scheduler.timesteps.max() <= 999


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "dpmsolver", "dpmsolver++", "dpmsingle"])
def test_every_timestep_can_be_a_step(name):
    scheduler = make_scheduler(name, steps=1000, prediction_type="v_prediction")
    assert run(scheduler, lambda x, t: 0.3 * torch.sin(3 * x + t / 300)).isfinite().all()
    assert scheduler.timesteps.max() == 999


def test_a_schedule_that_rounding_breaks_is_refused():
    with pytest.raises(UserError, match="dpm_2_a cannot make an image in 2 steps"):
        make_scheduler("dpm_2_a", steps=2, prediction_type="v_prediction", zero_terminal_snr=True)


@pytest.mark.parametrize("name", [s for s in SAMPLERS if not s.startswith("k_")])
def test_zero_terminal_starts_at_the_last_timestep_from_pure_noise(name):
    scheduler = make_scheduler(name, steps=10, prediction_type="v_prediction", zero_terminal_snr=True)
    assert scheduler.timesteps[0] == 999
    assert scheduler.alphas_cumprod[-1] == pytest.approx(0, abs=1e-6)
    expected = ddpm.zero_terminal(ddpm.alpha_bars(ddpm.scaled_linear_betas())).float()
    torch.testing.assert_close(scheduler.alphas_cumprod, expected, rtol=1e-3, atol=1e-6)  # float32 products


def test_mistakes_are_refused(monkeypatch):
    with pytest.raises(UserError, match="unknown sampler 'plms'"):
        make_scheduler("plms", steps=3, prediction_type="epsilon")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scipy" else find(name))
    with pytest.raises(UserError, match="k_lms needs the package scipy"):
        make_scheduler("k_lms", steps=3, prediction_type="epsilon")
