"""Final latents against diffusers' own pipelines around the same tiny weights, in float32: texts, noise and sampler.

The pipelines tokenise, encode and draw noise themselves. Latents are of order 1 to 10, the same operations are done in
another order, and every pipeline's result moves by more than 0.01 where one of its settings is changed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from library.errors import UserError
from library.families.flux.adapter import FluxFamily
from library.families.sd.adapter import SdFamily
from library.families.sd3.adapter import Sd3Family
from library.families.sdxl.adapter import SdxlFamily
from library.generation.control import ControlNets
from library.generation.drawing import HowToDraw, draw
from library.generation.highres import Highres
from library.generation.model import Model
from library.generation.networks import Networks, attach_rest, check_files, merge_first
from library.generation.requests import Request
from library.inference.generate import decode, sample_latents
from library.inference.images import to_images
from library.inference.prompts import ControlImage, SamplePrompt, SizeConditions, SourceImage
from library.inference.source_images import encode_inpainting
from library.options.inference import GenerationTextOptions
from library.registry import groups_for
from tests.builders import for_inpainting, sd_options, tiny_sd
from tests.builders.flux import as_diffusers_names, control_lora, flux_options, write_flux, write_parts
from tests.builders.options import options_with
from tests.builders.sd3 import sd3_options, write_tiny_sd3
from tests.builders.sdxl import tiny_sdxl
from tests.builders.t5 import write_t5_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CPU = torch.device("cpu")
CLOSE = 1e-3  # what is asked for; what is seen is below 1e-4
PROMPT = SamplePrompt("a red house", "blue tree", 64, 96, 7, 3, 4.0, "ddim")
SD_CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}


def model_of(family, models, opts) -> Model:
    return Model(family, models, opts, CPU, torch.float32, Networks())


def ours(model: Model, *prompts: SamplePrompt) -> Tensor:
    """As gen_img.py draws: texts by the cache, without the text encoders."""
    texts = [text for prompt in prompts for text in (prompt.prompt, prompt.negative_prompt, "")]
    return sample_latents(
        model.family,
        model.without_texts,
        prompts,
        CPU,
        cached=model.conditioning(texts),
        denoise=model.denoise,
        at_step=model.control and model.control.at_step,
    )


def arguments(prompt: SamplePrompt) -> dict:
    return {
        "prompt": prompt.prompt,
        "negative_prompt": prompt.negative_prompt,
        "width": prompt.width,
        "height": prompt.height,
        "num_inference_steps": prompt.steps,
        "guidance_scale": prompt.scale,
        "generator": torch.Generator().manual_seed(prompt.seed),
        "output_type": "latent",
    }


def run(pipe, **given) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**given).images


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


# --- Stable Diffusion 1.x and 2.x -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd1():
    return tiny_sd()


def texts_of_generation(family: str, **values):
    return options_with(*groups_for(family, "network"), GenerationTextOptions, **values)


def sd_pipe(kind, models, prediction: str = "epsilon", scheduler=DDIMScheduler):
    return kind(
        vae=models.vae,
        text_encoder=models.text_encoders["te"],
        tokenizer=models.tokenizers["te"],
        unet=models.denoiser,
        scheduler=scheduler.from_config({**SD_CONFIG, "prediction_type": prediction}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize(
    ("changes", "theirs"),
    [({}, {}), ({"scale": 1.0}, {}), ({"sampler": "euler"}, {})],
    ids=["guided", "unguided", "euler"],
)
def test_sd1(sd1, changes, theirs):
    prompt = replace(PROMPT, **changes)
    scheduler = EulerDiscreteScheduler if prompt.sampler == "euler" else DDIMScheduler
    pipe = sd_pipe(StableDiffusionPipeline, sd1, scheduler=scheduler)
    found = ours(model_of(SdFamily(sd_options("")), sd1, sd_options("")), prompt)
    assert difference(found, run(pipe, **arguments(prompt), **theirs)) < CLOSE


def test_sd1_at_another_layer(sd1):
    """The pipeline gets states of transformers' own model, as its way to the last norm is that of older versions."""
    opts, encoder, tokenizer = texts_of_generation("sd", clip_skip=2), sd1.text_encoders["te"], sd1.tokenizers["te"]
    found = ours(model_of(SdFamily(opts), sd1, opts), PROMPT)

    def states(text: str) -> Tensor:
        ids = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        hidden = encoder(ids, output_hidden_states=True).hidden_states[-2]
        return getattr(encoder, "text_model", encoder).final_layer_norm(hidden)

    given = arguments(PROMPT)
    texts = {"prompt_embeds": given.pop("prompt"), "negative_prompt_embeds": given.pop("negative_prompt")}
    with torch.no_grad():
        texts = {name: states(text) for name, text in texts.items()}
    pipe = sd_pipe(StableDiffusionPipeline, sd1)
    assert difference(found, run(pipe, **given, **texts)) < CLOSE
    assert difference(found, run(pipe, **arguments(PROMPT))) > 0.01


def test_sd2_that_predicts_v():
    models = tiny_sd(v2=True)
    opts = sd_options("", v2=True, v_parameterization=True)
    found = ours(model_of(SdFamily(opts), models, opts), PROMPT)
    pipe = sd_pipe(StableDiffusionPipeline, models, "v_prediction")
    assert difference(found, run(pipe, **arguments(PROMPT))) < CLOSE


def image(seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (PROMPT.height, PROMPT.width, 3), np.uint8)


def as_theirs(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_image_to_image(sd1, strength):
    prompt = replace(PROMPT, steps=4, strength=strength, source=SourceImage(Path("x"), pixels=image()))
    found = ours(model_of(SdFamily(sd_options("")), sd1, sd_options("")), prompt)
    pipe = sd_pipe(StableDiffusionImg2ImgPipeline, sd1)
    given = arguments(prompt)
    del given["width"], given["height"]
    assert difference(found, run(pipe, **given, image=as_theirs(image()), strength=strength)) < CLOSE


def test_inpainting_by_blending(sd1):
    mask = np.zeros((PROMPT.height, PROMPT.width), np.uint8)
    mask[16:56, 8:48] = 255
    source = SourceImage(Path("x"), Path("m"), pixels=image(), mask_pixels=mask)
    prompt = replace(PROMPT, steps=4, strength=0.75, source=source)
    found = ours(model_of(SdFamily(sd_options("")), sd1, sd_options("")), prompt)
    pipe = sd_pipe(StableDiffusionInpaintPipeline, sd1)
    theirs = {"image": as_theirs(image()), "mask_image": torch.from_numpy(mask)[None, None] / 255, "strength": 0.75}
    assert difference(found, run(pipe, **arguments(prompt), **theirs)) < CLOSE
    assert (
        difference(
            found,
            ours(
                model_of(SdFamily(sd_options("")), sd1, sd_options("")),
                replace(prompt, source=replace(source, mask=None, mask_pixels=None)),
            ),
        )
        > 0.01
    )


def half_masked() -> np.ndarray:
    mask = np.zeros((PROMPT.height, PROMPT.width), np.uint8)
    mask[16:56, 8:48] = 200
    return mask


def inpainted(sampler: str, strength: float, mask: np.ndarray) -> SamplePrompt:
    source = SourceImage(Path("x"), Path("m"), pixels=image(), mask_pixels=mask)
    return replace(PROMPT, steps=4, sampler=sampler, strength=strength, source=source)


def inpainting_arguments(prompt: SamplePrompt) -> dict:
    mask = torch.from_numpy(prompt.source.mask_pixels)[None, None] / 255
    return {
        **arguments(prompt),
        "image": as_theirs(prompt.source.pixels),
        "mask_image": mask,
        "strength": prompt.strength,
    }


@pytest.mark.parametrize(
    ("v2", "sampler", "strength"), [(False, "ddim", 1.0), (False, "euler", 0.5), (True, "ddim", 0.8)]
)
def test_models_for_inpainting(v2, sampler, strength):
    """They read the mask and the masked image; nothing is blended."""
    opts = sd_options("", v2=v2)
    models = for_inpainting(tiny_sd(v2))
    prompt = inpainted(sampler, strength, half_masked())
    found = ours(model_of(SdFamily(opts), models, opts), prompt)
    scheduler = EulerDiscreteScheduler if sampler == "euler" else DDIMScheduler
    pipe = sd_pipe(StableDiffusionInpaintPipeline, models, scheduler=scheduler)
    assert difference(found, run(pipe, **inpainting_arguments(prompt))) < CLOSE
    other = inpainted(sampler, strength, np.roll(half_masked(), 16))
    assert difference(found, run(pipe, **inpainting_arguments(other))) > 0.01


def test_models_for_inpainting_without_an_image_or_a_mask():
    """The mask then covers all, so that what is under it does not count."""
    opts, models = sd_options(""), for_inpainting(tiny_sd())
    model = model_of(SdFamily(opts), models, opts)
    everything = np.full((PROMPT.height, PROMPT.width), 255, np.uint8)
    pipe = sd_pipe(StableDiffusionInpaintPipeline, models)
    prompt = inpainted("ddim", 1.0, everything)
    expected = run(pipe, **inpainting_arguments(prompt))
    assert difference(ours(model, replace(prompt, source=None)), expected) < CLOSE
    assert difference(ours(model, replace(prompt, source=replace(prompt.source, mask=None))), expected) < CLOSE
    several = [replace(prompt, source=None, seed=seed) for seed in (7, 8)]
    assert difference(ours(model, *several)[:1], expected) < CLOSE


def test_a_model_for_inpainting_with_two_drawings(options):
    """The second drawing sees what the first one has made outside of the mask, of latents too."""
    opts, models = sd_options(""), for_inpainting(tiny_sd())
    model, prompt = model_of(SdFamily(opts), models, opts), inpainted("ddim", 0.5, half_masked())
    prompt = replace(prompt, width=128, height=192, source=replace(prompt.source, pixels=None, path=Path("gone")))
    highres = Highres.of(options(highres_fix_scale=0.5, highres_fix_latents_upscaling=True).highres)
    latents = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(1))
    (second,) = highres.with_first(model, [prompt], latents, torch.float32)
    second = replace(second, source=replace(second.source, mask_pixels=np.zeros((192, 128), np.uint8)))
    seen = encode_inpainting(model.family, models, [second], [torch.Generator().manual_seed(2)], CPU)
    with torch.no_grad():
        pixels = models.vae.decode(second.source.latents[None] / 0.18215).sample.clamp(-1, 1)
        expected = models.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(2)) * 0.18215
    assert seen.shape == (1, 5, 24, 16)
    assert not seen[:, 0].any()
    assert difference(seen[:, 1:], expected) < CLOSE


@pytest.fixture(scope="module")
def control_nets(sd1):
    nets = []
    for seed in (1, 2):
        net = SdFamily(sd_options("")).control.build(sd1)
        torch.manual_seed(seed)
        for name, weight in net.named_parameters():
            if name.startswith("controlnet_"):
                weight.data = 0.05 * torch.randn_like(weight)
        nets.append(net.eval())
    return nets


def test_several_control_nets(sd1, control_nets):
    """The first with all of the steps, the second with half of them."""
    family, guides = SdFamily(sd_options("")), tuple(ControlImage(Path("x"), image(seed)) for seed in (5, 6))
    model = model_of(family, sd1, sd_options(""))
    model.control = ControlNets(family, sd1, control_nets, (0.8, 1.5), (1.0, 0.5))
    prompt = replace(PROMPT, steps=4, guides=guides)
    found = ours(model, prompt)
    pipe = StableDiffusionControlNetPipeline(
        vae=sd1.vae,
        text_encoder=sd1.text_encoders["te"],
        tokenizer=sd1.tokenizers["te"],
        unet=sd1.denoiser,
        controlnet=control_nets,
        scheduler=DDIMScheduler.from_config(SD_CONFIG),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs = {
        "image": [as_theirs(guide.pixels) for guide in guides],
        "controlnet_conditioning_scale": [0.8, 1.5],
        "control_guidance_end": [1.0, 0.5],
    }
    assert difference(found, run(pipe, **arguments(prompt), **theirs)) < CLOSE
    assert difference(found, run(pipe, **arguments(prompt), **{**theirs, "control_guidance_end": 1.0})) > 0.01


def test_highres_fix_by_latents(sd1, options):
    """The same with two pipelines: text to image, then image to image from latents, each with its own seed."""
    model, taken = model_of(SdFamily(sd_options("")), sd1, sd_options("")), []
    highres = Highres.of(
        options(highres_fix_scale=0.5, highres_fix_steps=3, highres_fix_latents_upscaling=True).highres
    )
    prompt = replace(PROMPT, width=128, height=192, steps=4, strength=0.5)
    first = highres.first(prompt)
    assert (first.width, first.height, first.steps) == (64, 96, 3)
    how = HowToDraw(1, 1, vae_float32=True, slices=None, highres=highres, keeps_first=True)
    done: list[int] = []
    draw(model, [Request(prompt, "")], how, (), taken.append, done.append)
    assert sum(done) == how.steps([Request(prompt, "")]) == 5
    assert [(one.stage, one.image.size) for one in taken] == [("0", (64, 96)), ("1", (128, 192))]
    small = run(sd_pipe(StableDiffusionPipeline, sd1), **arguments(first))
    large = torch.nn.functional.interpolate(small, (24, 16), mode="bicubic")
    again = arguments(replace(prompt, seed=prompt.seed + 1))
    del again["width"], again["height"]
    pipe = sd_pipe(StableDiffusionImg2ImgPipeline, sd1)
    expected = run(pipe, **{**again, "output_type": "np"}, image=large, strength=0.5)
    assert np.abs(np.asarray(taken[1].image) / 255 - expected[0]).max() < 1.01 / 255  # rounded to 8 bits


@pytest.mark.parametrize("disabled", [False, True])
def test_control_nets_in_the_second_drawing(sd1, control_nets, options, disabled):
    """--highres_fix_disable_control_net: the second drawing is what image to image alone gives."""
    family = SdFamily(sd_options(""))
    model, taken = model_of(family, sd1, sd_options("")), []
    model.control = ControlNets(family, sd1, control_nets[:1], (1.0,), (1.0,))
    given = {"highres_fix_scale": 0.5, "highres_fix_steps": 1, "highres_fix_latents_upscaling": True}
    highres = Highres.of(options(**given, highres_fix_disable_control_net=disabled).highres)
    guides = (ControlImage(Path("x"), image(5)),)
    prompt = replace(PROMPT, width=128, height=192, steps=2, scale=1.0, strength=1.0)
    prompt = replace(prompt, guides=(ControlImage(Path("x"), np.repeat(image(5), 2, 0).repeat(2, 1)),))
    first = sample_latents(family, sd1, [replace(highres.first(prompt), guides=guides)], CPU, denoise=model.denoise)
    (second,) = highres.with_first(model, [prompt], first, torch.float32)
    taken = sample_latents(family, sd1, [second], CPU, denoise=model.denoise)
    plain = sample_latents(family, sd1, [replace(second, guides=())], CPU)
    assert (difference(taken, plain) < 1e-6) == disabled


def test_the_strength_of_the_first_drawing(options):
    """--highres_fix_strength, where drawing begins with an image; else the prompt's own."""
    prompt = replace(PROMPT, strength=0.3, steps=10, source=SourceImage(Path("x"), pixels=image()))
    for strength, steps in ((None, 3), (0.5, 5), (1.0, 10)):
        highres = Highres.of(
            options(highres_fix_scale=0.5, highres_fix_steps=10, highres_fix_strength=strength).highres
        )
        assert highres.first(prompt).steps_made == steps
        assert highres.second(prompt).steps_made == 3


class Upscaler:
    """As --highres_fix_upscaler takes it."""

    def __init__(self, by: int):
        self.by = by

    def upscale(self, images, width, height):
        return [image.resize((image.width * self.by, image.height * self.by)) for image in images]


def create_upscaler(by: str = "2") -> Upscaler:
    return Upscaler(int(by))


@pytest.mark.parametrize("module", [None, __name__])
def test_highres_fix_by_images(sd1, options, module, monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(create_upscaler=create_upscaler))
    model, taken = model_of(SdFamily(sd_options("")), sd1, sd_options("")), []
    highres = Highres.of(options(highres_fix_scale=0.5, highres_fix_steps=1, highres_fix_upscaler=module).highres)
    prompt = replace(PROMPT, width=128, height=192, steps=2, strength=0.0)  # what is enlarged stays as it is
    draw(model, [Request(prompt, "")], HowToDraw(1, 1, True, None, highres=highres), (), taken.append, lambda _: None)
    (drawn,) = taken
    assert (drawn.stage, drawn.image.size, drawn.prompt.seed) == ("1", (128, 192), 8)
    latents = sample_latents(model.family, model.models, [highres.first(prompt)], CPU)
    first = to_images(decode(model.family, model.models, latents, torch.float32))[0]
    how = {"resample": Image.Resampling.LANCZOS} if module is None else {}
    pixels = torch.from_numpy(np.array(first.resize((128, 192), **how))).permute(2, 0, 1)[None] / 127.5 - 1
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        again = sd1.vae.decode(sd1.vae.encode(pixels).latent_dist.sample(generator)).sample
    assert np.abs(np.asarray(drawn.image) - np.asarray(to_images(again)[0]).astype(int)).max() <= 1


def test_an_upscaler_that_does_not_fit_is_said(sd1, options, monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(create_upscaler=create_upscaler))
    model = model_of(SdFamily(sd_options("")), sd1, sd_options(""))
    given = {"highres_fix_scale": 0.5, "highres_fix_steps": 1, "highres_fix_upscaler": __name__}
    highres = Highres.of(options(**given, highres_fix_upscaler_args="by=3").highres)
    prompt = replace(PROMPT, width=128, height=192, steps=1)
    how = HowToDraw(1, 1, True, None, highres=highres)
    with pytest.raises(UserError, match="--highres_fix_upscaler: gave 192x288 where 1 of 128x192 are needed"):
        draw(model, [Request(prompt, "")], how, (), lambda _: None, lambda _: None)


# --- SDXL -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl()


def sdxl_pipe(sdxl, kind=StableDiffusionXLPipeline):
    return kind(
        vae=sdxl.vae,
        text_encoder=sdxl.text_encoders["te1"],
        tokenizer=sdxl.tokenizers["te1"],
        text_encoder_2=sdxl.text_encoders["te2"],
        tokenizer_2=sdxl.tokenizers["te2"],
        unet=sdxl.denoiser,
        scheduler=DDIMScheduler.from_config(SD_CONFIG),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def test_sdxl_with_another_text_for_the_second_encoder(sdxl):
    model = model_of(SdxlFamily(texts_of_generation("sdxl")), sdxl, texts_of_generation("sdxl"))
    model.second_text = "a cat of blue"
    prompt = replace(PROMPT, steps=2, scale=1.0)
    given = {**arguments(prompt), "original_size": (96, 64), "target_size": (96, 64)}
    found = ours(model, prompt)
    assert difference(found, run(sdxl_pipe(sdxl), **given, prompt_2="a cat of blue")) < CLOSE
    assert difference(found, run(sdxl_pipe(sdxl), **{**given, "generator": torch.Generator().manual_seed(7)})) > 0.01


@pytest.mark.parametrize(
    ("changes", "theirs", "clip_skip"),
    [
        ({}, {}, None),
        ({"scale": 1.0}, {}, 2),
        ({"scale": 1.0}, {"clip_skip": 1}, 3),  # which theirs has for the prompt alone
        (
            {"sizes": SizeConditions(300, 200, 500, 400, 16, 24)},
            {
                "original_size": (200, 300),
                "negative_original_size": (400, 500),
                "crops_coords_top_left": (16, 24),
                "negative_crops_coords_top_left": (16, 24),
                "negative_target_size": (96, 64),
            },
            None,
        ),
    ],
    ids=["guided", "unguided", "layer", "sizes"],
)
def test_sdxl(sdxl, changes, theirs, clip_skip):
    prompt = replace(PROMPT, steps=2, **changes)
    opts = texts_of_generation("sdxl", clip_skip=clip_skip)
    given = {**arguments(prompt), "original_size": (96, 64), "target_size": (96, 64), **theirs}
    found = ours(model_of(SdxlFamily(opts), sdxl, opts), prompt)
    assert difference(found, run(sdxl_pipe(sdxl), **given)) < CLOSE


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_sdxl_for_inpainting(sdxl, strength):
    models, opts = for_inpainting(sdxl), texts_of_generation("sdxl")
    prompt = inpainted("ddim", strength, half_masked())
    found = ours(model_of(SdxlFamily(opts), models, opts), prompt)
    sizes = {"original_size": (96, 64), "target_size": (96, 64)}
    pipe = sdxl_pipe(models, StableDiffusionXLInpaintPipeline)
    assert difference(found, run(pipe, **inpainting_arguments(prompt), **sizes)) < CLOSE


# --- rectified flow ---------------------------------------------------------------------------------------------------


def even(steps: int) -> Sequence[float]:
    """Noise levels before the shift. Without them the pipelines of diffusers shift the last one twice."""
    return np.linspace(1.0, 1 / steps, steps)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> Model:
    folder = tmp_path_factory.mktemp("sd3")
    write_t5_tokenizer(folder / "google_t5-v1_1-xxl")
    opts = sd3_options(write_tiny_sd3(folder / "sd3.safetensors", encoders=("te1", "te2", "te3")), cache=str(folder))
    family = Sd3Family(opts)
    return model_of(family, family.loader.load(), opts)


def sd3_pipe(kind, model: Model):
    encoders, tokenizers = model.models.text_encoders, model.models.tokenizers
    return kind(
        transformer=model.models.denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=model.models.vae,
        text_encoder=encoders["te1"],
        tokenizer=tokenizers["te1"],
        text_encoder_2=encoders["te2"],
        tokenizer_2=tokenizers["te2"],
        text_encoder_3=encoders["te3"],
        tokenizer_3=tokenizers["te3"],
    )


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_sd3(sd3, scale):
    prompt = replace(PROMPT, scale=scale, sampler="euler")
    pipe = sd3_pipe(StableDiffusion3Pipeline, sd3)
    expected = run(pipe, **arguments(prompt), sigmas=even(prompt.steps), max_sequence_length=256)
    assert difference(ours(sd3, prompt), expected) < CLOSE


def test_image_to_image_of_a_flow_model(sd3):
    source = SourceImage(Path("x"), pixels=image())
    prompt = replace(PROMPT, scale=2.0, sampler="euler", steps=4, strength=0.5, source=source)
    given = {**arguments(prompt), "sigmas": even(4), "max_sequence_length": 256}
    pipe = sd3_pipe(StableDiffusion3Img2ImgPipeline, sd3)
    assert difference(ours(sd3, prompt), run(pipe, **given, image=as_theirs(image()), strength=0.5)) < CLOSE


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_flux(tmp_path, scale):
    opts = flux_options(write_flux(tmp_path, "dev"), t5xxl_max_token_length=16, **write_parts(tmp_path))
    family = FluxFamily(opts)
    models = family.loader.load()
    prompt = replace(PROMPT, scale=scale, sampler="euler", guidance=2.5)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=models.vae,
        text_encoder=models.text_encoders["te1"],
        tokenizer=models.tokenizers["te1"],
        text_encoder_2=models.text_encoders["te3"],
        tokenizer_2=models.tokenizers["te3"],
        transformer=models.denoiser,
    )
    given = {**arguments(prompt), "guidance_scale": 2.5, "true_cfg_scale": scale, "max_sequence_length": 16}
    packed = run(pipe, **given)
    expected = FluxPipeline._unpack_latents(packed, prompt.height, prompt.width, 8)
    assert difference(ours(model_of(family, models, opts), prompt), expected) < CLOSE


@pytest.fixture(scope="module")
def control_lora_file(tmp_path_factory) -> Path:
    return control_lora(tmp_path_factory.mktemp("control") / "canny.safetensors")


@pytest.mark.parametrize(("strength", "merged"), [(1.0, False), (1.0, True), (0.5, False)])
def test_a_control_lora_of_flux(tmp_path, options, control_lora_file, strength, merged):
    """The control image as latents beside the noisy ones. Norms of queries and keys are replaced at any strength.

    The pipeline reads 512 tokens whatever max_sequence_length says, and takes tensors of images in [-1, 1].
    """
    opts = flux_options(write_flux(tmp_path, "dev"), t5xxl_max_token_length=512, **write_parts(tmp_path))
    family = FluxFamily(opts)
    models = family.loader.load()
    pipe = FluxControlPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=models.vae,
        text_encoder=models.text_encoders["te1"],
        tokenizer=models.tokenizers["te1"],
        text_encoder_2=models.text_encoders["te3"],
        tokenizer_2=models.tokenizers["te3"],
        transformer=copy.deepcopy(models.denoiser),
    )
    pipe.load_lora_weights(as_diffusers_names(load_file(control_lora_file)))
    prompt = replace(PROMPT, scale=1.0, sampler="euler", guidance=2.5, guides=(ControlImage(Path("x"), image()),))
    given = {**arguments(prompt), "guidance_scale": 2.5}
    del given["negative_prompt"]
    scale = {"joint_attention_kwargs": {"scale": strength}}
    packed = run(pipe, **given, control_image=as_theirs(image()) * 2 - 1, **scale)
    expected = FluxControlPipeline._unpack_latents(packed, prompt.height, prompt.width, 8)

    chosen = options(network_weights=[str(control_lora_file)], network_mul=[strength], network_merge=merged).networks
    files = check_files(chosen)
    merge_first(chosen, files, family, models)
    model = model_of(family, models, opts)
    model.networks = attach_rest(chosen, files, family, models, CPU)
    model.networks.use(None, chosen.multipliers())
    assert difference(ours(model, prompt), expected) < CLOSE
    other = replace(prompt, guides=(ControlImage(Path("x"), image(4)),))
    assert difference(ours(model, other), expected) > 0.01
    with pytest.raises(UserError, match="no control image"):
        ours(model, replace(prompt, guides=()))


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_of_four_is_four_single_images(sd1):
    model = model_of(SdFamily(sd_options("")), sd1, sd_options(""))
    prompts = [replace(PROMPT, prompt=text, seed=seed) for seed, text in enumerate(("a", "red", "a cat", ""))]
    together = ours(model, *prompts)
    alone = torch.cat([ours(model, prompt) for prompt in prompts])
    assert difference(together, alone) < CLOSE


def test_a_weight_of_one_is_none(sd1):
    for mode in ("original", "abs", "none"):
        opts = texts_of_generation("sd", emb_normalize_mode=mode)
        model = model_of(SdFamily(opts), sd1, opts)
        assert difference(ours(model, replace(PROMPT, prompt="a (red:1.0) house")), ours(model, PROMPT)) < 1e-6
