"""The tools that fill the caches of a training run: which family, whose options, and what is refused."""

from __future__ import annotations

import pytest
from PIL import Image

from library import registry
from library.options import parsing, scripts
from library.options.base import options_of
from library.preparation.caching import GROUPS, cache_latents, cache_texts, traits_of
from library.preparation.script import run_script

SD = "examples/tiny_model/tiny-sd.safetensors"
NONE = "--pretrained_model_name_or_path="


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("data") / "1_thing"
    place.mkdir()
    Image.new("RGB", (64, 64)).save(place / "a.png")
    (place / "a.caption").write_text("a thing", encoding="utf-8")
    return place.parent


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_the_options_of_every_family_are_taken(family):
    known = {option.dest for group in GROUPS for option in options_of(group)}
    assert {option.dest for option in options_of(scripts._family_module(family).OPTIONS)} <= known
    first = next(iter(registry.FAMILIES))
    opts = parsing.parse_options(GROUPS, [] if family == first else [f"--{family}"])
    assert traits_of(opts) is scripts.traits_for(family)


@pytest.mark.rows("R257")
@pytest.mark.parametrize(
    ("work", "arguments", "said"),
    [
        (cache_latents, ("--sdxl", "--flux"), "--sdxl and --flux cannot both be; choose one kind of model"),
        (cache_latents, ("--color_aug",), "cannot be used with --color_aug"),
        (cache_latents, ("--sdxl",), "this is a Stable Diffusion 1.x model; a VAE, or an SDXL model, is needed here"),
        (cache_latents, ("--in_json=gone.json",), "--in_json: there is no file 'gone.json'"),
        (cache_latents, ("--flux",), "this is a Stable Diffusion 1.x model; a VAE, or a FLUX model, is needed here"),
        (cache_texts, (), "say what the model is: --sdxl, --sd3, --flux"),
        (cache_texts, ("--sdxl",), "this is a Stable Diffusion 1.x model; a whole SDXL model is needed here"),
        (cache_texts, ("--sdxl", "--shuffle_caption"), "shuffle_caption"),
        (cache_latents, (NONE,), "name a model, or its VAE alone with --vae"),
        (cache_latents, ("--flux", NONE), "name a model, or its VAE alone with --ae"),
        (cache_texts, ("--sdxl", NONE), "--pretrained_model_name_or_path: name a model: a file, a Diffusers folder"),
        (cache_texts, ("--flux", NONE), "or its text encoders, with --clip_l and --t5xxl"),
    ],
)
def test_mistakes_are_clear_lines(folder, capsys, work, arguments, said):
    line = (f"--train_data_dir={folder}", f"--pretrained_model_name_or_path={SD}", "--resolution=64", *arguments)
    with pytest.raises(SystemExit) as stop:
        run_script(work, GROUPS, line, description="", traits=traits_of)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed, printed
    assert not list(folder.rglob("*.npz"))


def test_what_is_of_another_family_or_of_training_does_no_harm(folder, tmp_path, capsys):
    place = tmp_path / "1_thing"
    place.mkdir()
    (place / "a.png").write_bytes((folder / "1_thing" / "a.png").read_bytes())
    line = (
        *(f"--train_data_dir={tmp_path}", f"--pretrained_model_name_or_path={SD}", "--resolution=64"),
        *("--guidance_scale=1", "--cache_text_encoder_outputs", "--max_train_steps=5", "--save_every_n_epochs=1"),
    )
    run_script(cache_latents, GROUPS, line, description="", traits=traits_of)
    printed = capsys.readouterr().err
    assert "--guidance_scale: no effect on Stable Diffusion 1.x/2.x" in printed
    assert "1 done" in printed
    assert (place / "a_0064x0064_sd.npz").is_file()
