"""Images that guide: ControlNet-LLLite against its formula and training's code, and images as CLIP sees them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from library.errors import UserError
from library.families.sdxl.adapter import SdxlFamily
from library.generation.control import Lllites, check_control_nets, load_control_nets
from library.generation.model import Model
from library.generation.requests import Requests, base_prompt
from library.generation.script import ALL_FAMILIES
from library.generation.vision import load_vision
from library.inference.generate import sample_latents
from library.inference.guidance import texts_read
from library.inference.prompts import SamplePrompt
from library.options.validation import problems, warnings
from library.types import Models
from tests.builders.options import options_for, options_with
from tests.builders.sdxl import POOLED, tiny_sdxl, write_tiny_sdxl
from tests.families.test_controlnet import batch_of, inputs_of
from tests.families.test_lllite import family_with, paths_by_key, plain_change, shaken
from tests.generation.test_against_pipelines import CLOSE, PROMPT, arguments, difference, model_of, run, sdxl_pipe
from tests.generation.test_script import draw_here, refused  # noqa: F401 - fixtures

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def unet():
    return tiny_sdxl().denoiser


@pytest.fixture(scope="module")
def lllites(unet, tmp_path_factory) -> list[str]:
    """The files of two."""
    folder, family = tmp_path_factory.mktemp("lllite"), family_with()
    for number in (1, 2):
        net = shaken(family.lllite.build(Models(copy.deepcopy(unet), {}, {}, None)))
        for weight in net.parameters():
            weight.data *= number / 2
        path = folder / f"{number}.safetensors"
        family.lllite.save(net, path, save_as="safetensors", dtype=None, metadata={})
    return [str(folder / f"{number}.safetensors") for number in (1, 2)]


def loaded(unet, **values) -> tuple[Lllites, Models]:
    family, models = SdxlFamily(options_for("sdxl", "network")), Models(copy.deepcopy(unet), {}, {}, None)
    nets = load_control_nets(options_with(*ALL_FAMILIES, **values).control, family, models, torch.float32)
    assert isinstance(nets, Lllites)
    return nets, models


def prediction(nets: Lllites, models: Models, batch):
    _, timesteps, cond, _ = inputs_of(nets.family)
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(4))

    def predict(*given):
        return nets.family.denoiser.predict(models, *given)

    return nets.denoise(predict, noisy, timesteps, cond, batch), (noisy, timesteps, cond)


@torch.no_grad()
def test_one_lllite_predicts_as_in_training(unet, lllites):
    """The very same numbers as `Control.predict`, which training calls; at half strength others."""
    nets, models = loaded(unet, control_net_lllite_models=lllites[:1])
    batch = batch_of(side=128)
    found, inputs = prediction(nets, models, batch)
    training, theirs = family_with(), Models(copy.deepcopy(unet), {}, {}, None)
    net = training.lllite.load(theirs, lllites[0])
    expected = training.lllite.predict(theirs, net, *inputs, batch)
    assert torch.equal(found, expected)
    net.multiplier = 0.5
    half, _ = prediction(*loaded(unet, control_net_lllite_models=lllites[:1], control_net_multipliers=[0.5]), batch)
    assert torch.equal(half, training.lllite.predict(theirs, net, *inputs, batch))
    assert (found - half).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_two_lllites_act_one_after_the_other_and_for_their_share(unet, lllites, share):
    """Their formula, with an image each; the second for half of the steps."""
    given = {"control_net_lllite_models": lllites, "control_net_multipliers": [0.8, 1.5]}
    nets, models = loaded(unet, **given, control_net_ratios=[1.0, 0.5])
    batch = batch_of(side=128)
    batch = replace(batch, control=torch.cat([batch.control, batch.control.flip(2)], dim=1))
    nets.at_step(share)
    found, inputs = prediction(nets, models, batch)
    plain = Models(copy.deepcopy(unet), {}, {}, None)
    for path, strength, control in zip(lllites, (0.8, 1.5), batch.control.chunk(2, dim=1), strict=True):
        if path == lllites[1] and share > 0.5:
            continue
        tensors = load_file(path)
        for name, place in paths_by_key(plain.denoiser).items():

            def change(_module, args, name=name, tensors=tensors, strength=strength, image=control * 2 - 1):
                return (plain_change(tensors, name, args[0], image, strength),)

            plain.denoiser.get_submodule(place).register_forward_pre_hook(change)
    expected = nets.family.denoiser.predict(plain, *inputs, batch)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    bare = nets.family.denoiser.predict(Models(unet, {}, {}, None), *inputs, batch)
    assert torch.equal(prediction(nets, models, replace(batch, control=None))[0], bare)
    assert (found - bare).abs().max() > 0.01


def test_lllites_and_their_images_are_checked(options, lllites, tmp_path, image):
    save_file({"input_hint_block.0.weight": torch.zeros(1)}, tmp_path / "net.safetensors")
    wrong = options(prompt="a", control_net_lllite_models=[str(tmp_path / "net.safetensors"), str(tmp_path), "gone"])
    with pytest.raises(UserError) as error:
        check_control_nets(wrong.control)
    assert [problem.rpartition(": ")[2] for problem in error.value.problems] == [
        "this is a ControlNet; a ControlNet-LLLite is needed here",
        "this is a folder; the file of a ControlNet-LLLite is needed here",
        "no such file or folder (and not a hub id of the form owner/model)",
    ]
    both = options(ckpt="x", prompt="a", control_net_lllite_models=lllites, control_net_models=["x"])
    assert "--control_net_lllite_models: cannot be used with --control_net_models; use one of them" in problems(
        both, SdxlFamily.traits
    )
    many = options(ckpt="x", prompt="a", control_net_lllite_models=lllites, control_net_preps=["none"] * 3)
    assert problems(many, SdxlFamily.traits) == [
        "--control_net_preps: has more values than --control_net_lllite_models, 2"
    ]


def test_gen_img_draws_with_a_lllite(draw_here, lllites, image, tmp_path, capsys):  # noqa: F811
    model = write_tiny_sdxl(tmp_path / "xl.safetensors")
    words = [f"--ckpt={model}", f"--guide_image_path={image}", "--control_net_lllite_models", *lllites]
    status, folder = draw_here("--prompt=a cat --f one", *words, "--control_net_preps", "canny", "none")
    assert status == 0, capsys.readouterr().err
    status, _ = draw_here("--prompt=a cat --f two", *words, "--control_net_multipliers", "0", "0")
    with Image.open(folder / "one.png") as one, Image.open(folder / "two.png") as two:
        assert not np.array_equal(np.asarray(one), np.asarray(two))


def test_a_lllite_for_another_model_is_refused(refused, lllites, image):  # noqa: F811
    words = ["--prompt=a", f"--guide_image_path={image}", f"--control_net_lllite_models={lllites[0]}"]
    assert "--control_net_lllite_models: there are none for Stable Diffusion 1.x/2.x here" in refused(*words)


# --- CLIP -------------------------------------------------------------------------------------------------------------


def write_vision(folder: Path, width: int = POOLED) -> Path:
    """A tiny CLIP vision model in transformers' layout."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, projection_dim=width, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    return write_vision(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl()


def drawn(model: Model, prompt: SamplePrompt):
    texts = model.conditioning(texts_read(prompt))
    return sample_latents(model.family, model.without_texts, [prompt], CPU, cached=texts, denoise=model.denoise)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_an_image_takes_the_place_of_the_pooled_text(sdxl, vision, image, scale, options):
    """The same with diffusers' pipeline, given the embeddings that transformers' model computes times the strength."""
    model = model_of(SdxlFamily(options_for("sdxl", "network")), sdxl, options_for("sdxl", "network"))
    given = {"clip_vision_strength": 1.5, "clip_vision_model": str(vision), "guide_image_path": [str(image)]}
    model.vision = load_vision(options(**given).source, model.family.traits, CPU, torch.float32)
    prompt = replace(PROMPT, steps=2, scale=scale, seen=image)
    found = drawn(model, prompt)
    net, make = CLIPVisionModelWithProjection.from_pretrained(vision), CLIPImageProcessorPil.from_pretrained(vision)
    with torch.no_grad(), Image.open(image) as opened:
        embedding = net(**make(images=opened.convert("RGB"), return_tensors="pt")).image_embeds
    pipe, words = sdxl_pipe(sdxl), arguments(prompt)
    texts = pipe.encode_prompt(words.pop("prompt"), negative_prompt=words.pop("negative_prompt"))
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = {**dict(zip(names, texts, strict=True)), "original_size": (96, 64), "target_size": (96, 64)}
    expected = run(pipe, **words, **{**given, "pooled_prompt_embeds": 1.5 * embedding})
    assert difference(found, expected) < CLOSE
    assert difference(found, drawn(model, replace(prompt, seen=None))) > 0.01


def test_which_image_clip_sees(options, vision, image, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png")
    usual = {"prompt": "a", "clip_vision_strength": 1.0, "clip_vision_model": str(vision)}
    guide, source = {"guide_image_path": [str(tmp_path / "other.png")]}, {"image_path": str(image)}

    def seen(**values) -> tuple[Path | None, dict[str, str]]:
        from library.generation.sources import Sources

        opts, failed = options(**usual, **values), {}
        base = base_prompt(opts, SdxlFamily.traits)
        made = Requests(opts, SdxlFamily.traits, base, failed.__setitem__, Sources.of(opts.source))
        found = made.of([("--prompt", "a")])
        return (found[0].prompt.seen if found else None), failed

    assert seen(**guide)[0] == tmp_path / "other.png"
    assert seen(**source)[0] == image
    assert seen(**source, **guide)[0] == tmp_path / "other.png"
    assert seen(**source, **guide, control_net_models=["x"])[0] == image
    (tmp_path / "other.png").write_text("no image")
    assert "other.png: the image cannot be read" in seen(**guide)[1]["--prompt"]
    nothing = options(ckpt="x", **usual)
    assert problems(nothing, SdxlFamily.traits) == [
        "--clip_vision_strength: needs --guide_image_path, or --image_path, the image that CLIP sees"
    ]
    with_sd = options_with(*ALL_FAMILIES, ckpt="x", **usual, **guide)
    assert any("--clip_vision_strength: has no effect on Stable" in line for line in warnings(with_sd, sd_traits()))


def sd_traits():
    from library.families.sd.adapter import SdFamily

    return SdFamily.traits


def test_vision_models_that_do_not_fit_are_said(sdxl, options, image, tmp_path):
    usual = {"clip_vision_strength": 1.0, "guide_image_path": [str(image)]}
    with pytest.raises(UserError, match="--clip_vision_model: gone: no such folder"):
        load_vision(options(**usual, clip_vision_model="gone").source, SdxlFamily.traits, CPU, torch.float32)
    with pytest.raises(UserError, match=r"--clip_vision_model: .*cannot be read as a CLIP vision model"):
        load_vision(options(**usual, clip_vision_model=str(tmp_path)).source, SdxlFamily.traits, CPU, torch.float32)
    model = model_of(SdxlFamily(options_for("sdxl", "network")), sdxl, options_for("sdxl", "network"))
    wide = options(**usual, clip_vision_model=str(write_vision(tmp_path / "wide", width=48))).source
    model.vision = load_vision(wide, SdxlFamily.traits, CPU, torch.float32)
    with pytest.raises(UserError, match="the vision model gives 48 numbers for an image; 64 are needed"):
        drawn(model, replace(PROMPT, seen=image))


def test_gen_img_draws_what_clip_sees(draw_here, vision, image, tmp_path, capsys):  # noqa: F811
    model = write_tiny_sdxl(tmp_path / "xl.safetensors")
    words = [f"--ckpt={model}", f"--clip_vision_model={vision}", f"--image_path={image}", "--strength=1"]
    status, folder = draw_here("--prompt=a cat --f one", *words, "--clip_vision_strength=4")
    assert status == 0, capsys.readouterr().err
    draw_here("--prompt=a cat --f two", *words, "--clip_vision_strength=0")
    with Image.open(folder / "one.png") as one, Image.open(folder / "two.png") as two:
        assert np.asarray(one).shape == (64, 64, 3)
        assert not np.array_equal(np.asarray(one), np.asarray(two))
