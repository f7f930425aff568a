"""Reference: diffusers' StableDiffusionPipeline around the same tiny models, with the same noise."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from library.families.sd.adapter import SdFamily
from library.inference.generate import decode, generate, sample_latents, total_steps
from library.inference.images import to_images
from library.inference.prompts import SamplePrompt
from library.inference.samplers import make_scheduler
from library.text.emphasis import weighted
from tests.builders import sd_options, tiny_sd

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # diffusers with newer numpy

CPU = torch.device("cpu")
PROMPT = SamplePrompt("a red cube", "blurry", 64, 96, 7, 5, 6.0, "ddim")
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
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "dpm_2_a": diffusers.KDPM2AncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
}


def pipeline_latents(family, models, prompt: SamplePrompt, prediction: str = "epsilon") -> torch.Tensor:
    states = (family.text.encode(models, [text]).tensors["states"] for text in (prompt.prompt, prompt.negative_prompt))
    return latents_of_states(models, prompt, *states, prediction)


def latents_of_states(models, prompt: SamplePrompt, states, negative_states, prediction="epsilon") -> torch.Tensor:
    scheduler = CLASSES[prompt.sampler].from_config({**SD_CONFIG, "prediction_type": prediction})
    pipe = StableDiffusionPipeline(
        vae=models.vae,
        text_encoder=models.text_encoders["te"],
        tokenizer=None,
        unet=models.denoiser,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=states,
        negative_prompt_embeds=negative_states,
        width=prompt.width,
        height=prompt.height,
        num_inference_steps=prompt.steps,
        guidance_scale=prompt.scale,
        generator=torch.Generator().manual_seed(prompt.seed),
        output_type="latent",
    ).images


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", CLASSES)
def test_latents_match_the_diffusers_pipeline(models, make_family, sampler, prediction):
    family, prompt = make_family(prediction), replace(PROMPT, sampler=sampler)
    ours = sample_latents(family, models, [prompt], CPU)
    theirs = pipeline_latents(family, models, prompt, prediction)
    assert ours.shape == (1, 4, 12, 8)
    # same operations in float32; latents are of order 1 to 10
    assert (ours - theirs).abs().max() < 1e-4


def test_without_guidance_the_negative_prompt_is_not_computed(models, make_family):
    family, prompt = make_family(), replace(PROMPT, scale=1.0)
    ours = sample_latents(family, models, [prompt], CPU)
    assert {call[0] for call in family.calls} == {1}
    assert (ours - pipeline_latents(family, models, prompt)).abs().max() < 1e-4


def test_scale_zero_is_the_negative_prompt_alone(models, make_family):
    zero = sample_latents(make_family(), models, [replace(PROMPT, scale=0.0)], CPU)
    negative = replace(PROMPT, prompt=PROMPT.negative_prompt, scale=1.0)
    torch.testing.assert_close(zero, sample_latents(make_family(), models, [negative], CPU), rtol=0, atol=1e-5)


@pytest.mark.rows("R280")
def test_brackets_weigh_words_in_both_prompts():
    """Reference: the plain words' states, scaled by hand, given to diffusers. --weighted_captions is not asked for."""
    family, models = SdFamily(sd_options("")), tiny_sd()
    # "a red house tree" stands at 1 to 4, "blue lake" at 1 and 2
    with torch.no_grad():
        plain, negative = (
            family.text.encode(models, [t]).tensors["context"] for t in ("a red house tree", "blue lake")
        )
    weights, negative_weights = torch.ones(77), torch.ones(77)
    weights[2], weights[3], weights[4], negative_weights[2] = 1.5, 1 / 1.1, 1.1, 0.5
    prompt = replace(PROMPT, prompt="a (red:1.5) [house] (tree)", negative_prompt="blue (lake:0.5)", scale=3.0)
    ours = sample_latents(family, models, [prompt], CPU)
    weighted = plain * weights[:, None], negative * negative_weights[:, None]
    # same operations in float32; latents are of order 1 to 10
    assert (ours - latents_of_states(models, prompt, *weighted)).abs().max() < 1e-4
    assert (ours - latents_of_states(models, prompt, plain, negative)).abs().max() > 1e-2
    assert (ours - latents_of_states(models, prompt, weighted[0], negative)).abs().max() > 1e-2


def test_texts_of_different_length_are_computed_apart(models, make_family):
    family = make_family(padded=False)
    ours = sample_latents(family, models, [PROMPT], CPU)
    assert {call[:2] for call in family.calls} == {(1, len("a red cube") + 2), (1, len("blurry") + 2)}
    # without padding the two are different conditions; predicted by hand here with DDIM
    scheduler = CLASSES["ddim"].from_config(SD_CONFIG)
    scheduler.set_timesteps(PROMPT.steps)
    x = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(7))
    yes, no = (family.text.encode(models, [text]).tensors["states"] for text in (PROMPT.prompt, PROMPT.negative_prompt))
    for t in scheduler.timesteps:
        with_text, without = (models.denoiser(x, t, states).sample for states in (yes, no))
        x = scheduler.step(without + PROMPT.scale * (with_text - without), t, x).prev_sample
    assert (ours - x).abs().max() < 1e-4


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpm_2_a"])
def test_the_batch_does_not_change_an_image(models, make_family, sampler):
    prompts = [
        replace(PROMPT, prompt=text, seed=seed, sampler=sampler) for text, seed in (("a", 1), ("b", 2), ("c", 3))
    ]
    together = sample_latents(make_family(), models, prompts, CPU)
    for index, prompt in enumerate(prompts):
        alone = sample_latents(make_family(), models, [prompt], CPU)
        torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=2e-4)  # batched kernels round apart
    assert (together[0] - together[1]).abs().max() > 0.1


def test_generate_batches_equal_neighbours_and_keeps_the_order(models, make_family):
    family, tall = make_family(), replace(PROMPT, height=128, prompt="tall")
    prompts = [PROMPT, replace(PROMPT, prompt="b", seed=3), replace(PROMPT, prompt="c"), tall, PROMPT]
    done = []
    images = generate(family, models, prompts, "cpu", batch_size=2, progress=done.append)
    assert [call[0] for call in family.calls[::5]] == [4, 2, 2, 2]  # doubled by guidance
    assert family.calls[0][2] == [[64, 96]] * 4
    assert [image.size for image in images] == [(64, 96)] * 3 + [(64, 128), (64, 96)]
    assert sum(done) == total_steps(prompts) == 25
    single = generate(make_family(), models, PROMPT, "cpu")[0]
    assert to_array(images[0]).sub(to_array(single)).abs().max() <= 1
    assert torch.equal(to_array(images[4]), to_array(single))


@pytest.mark.parametrize("sampler", ["pndm", "heun", "dpm_2"])
def test_progress_counts_steps_where_samplers_look_more_often(models, make_family, sampler):
    done, prompts = [], [replace(PROMPT, sampler=sampler)]
    generate(make_family(), models, prompts, "cpu", progress=done.append)
    assert sum(done) == 5


def to_array(image) -> torch.Tensor:
    import numpy

    return torch.from_numpy(numpy.asarray(image).astype("int16"))


def test_pixels_become_images_by_the_definition():
    pixels = torch.tensor([-2.0, -1.0, -0.5, 0.0, 1.0, 3.0, float("nan")]).view(1, 1, 1, 7).expand(1, 3, 2, 7)
    (image,) = to_images(pixels)
    assert (image.size, image.mode) == ((7, 2), "RGB")
    assert [image.getpixel((x, 1))[0] for x in range(7)] == [0, 0, 64, 128, 255, 255, 128]


def test_decoding_in_float32_gives_the_vae_back(models, make_family):
    models.vae.to(torch.bfloat16)
    before = {name: value.clone() for name, value in models.vae.state_dict().items()}
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = []
    handle = models.vae.decoder.conv_in.register_forward_pre_hook(
        lambda m, a: seen.append((a[0].dtype, m.weight.dtype))
    )
    pixels = decode(make_family(), models, latents, torch.float32, widen=True)
    handle.remove()
    assert seen == [(torch.float32, torch.float32)]
    assert pixels.dtype == torch.float32
    after = models.vae.state_dict()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())


def test_bfloat16_computes_in_bfloat16_and_stays_near(models, make_family):
    seen = []
    handle = models.denoiser.mid_block.resnets[0].conv1.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    prompt = replace(PROMPT, scale=2.0)
    low = sample_latents(make_family(), models, [prompt], CPU, torch.bfloat16)
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert low.dtype == torch.float32
    full = sample_latents(make_family(), models, [prompt], CPU)
    assert 0 < (low - full).abs().max() < 0.05 * full.abs().max()


def test_a_prompt_without_seed_leaves_the_global_random_state(models, make_family):
    state = torch.get_rng_state()
    first, second = (generate(make_family(), models, replace(PROMPT, seed=None, steps=1), "cpu") for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(to_array(first[0]), to_array(second[0]))


def test_no_gradient_is_kept(models, make_family):
    models.denoiser.requires_grad_(True)
    assert not sample_latents(make_family(), models, [PROMPT], CPU).requires_grad


@pytest.mark.parametrize("evening", ["original", "abs", "none"])
def test_weighted_states_keep_a_mean(evening):
    """Reference: numpy."""
    rng = np.random.default_rng(0)
    states, weights = rng.normal(0.5, 1, (2, 5, 3)), rng.uniform(0.5, 1.5, (2, 5))
    result = states * weights[:, :, None]
    size = np.abs if evening == "abs" else np.asarray
    if evening != "none":
        result *= (size(states).mean((1, 2)) / size(result).mean((1, 2)))[:, None, None]
    ours = weighted(torch.tensor(states), torch.tensor(weights), evening)
    torch.testing.assert_close(ours, torch.tensor(result), rtol=0, atol=1e-6)  # means in float32


def test_a_negative_prompt_with_a_scale_of_its_own(models, make_family):
    """By hand, with DDIM: away from the negative prompt and towards the prompt, both as seen from an empty text."""
    family, prompt = make_family(), replace(PROMPT, negative_scale=1.5)
    ours = sample_latents(family, models, [prompt], CPU)
    scheduler = CLASSES["ddim"].from_config(SD_CONFIG)
    scheduler.set_timesteps(PROMPT.steps)
    x = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(7))
    texts = (PROMPT.prompt, PROMPT.negative_prompt, "")
    states = [family.text.encode(models, [text]).tensors["states"] for text in texts]
    for t in scheduler.timesteps:
        yes, no, empty = (models.denoiser(x, t, each).sample for each in states)
        x = scheduler.step(empty + PROMPT.scale * (yes - empty) - 1.5 * (no - empty), t, x).prev_sample
    assert (ours - x).abs().max() < 1e-4
    assert {call[0] for call in family.calls} == {3}


def test_zero_offset_begins_the_timesteps_at_zero():
    for name in ("ddim", "pndm"):
        given = {"steps": 4, "prediction_type": "epsilon"}
        plain, zero = make_scheduler(name, **given), make_scheduler(name, **given, zero_offset=True)
        assert (plain.timesteps - zero.timesteps).unique().tolist() == [1]
