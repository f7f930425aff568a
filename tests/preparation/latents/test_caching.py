"""The tools that fill the caches of a training run: which family, whose options, and what is refused."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from library import registry
from library.families.sdxl.adapter import SdxlText
from library.options import parsing
from library.options.base import options_of
from library.preparation.common.script import run_script
from library.preparation.latents.caching import GROUPS, cache_latents, cache_texts, traits_of
from tests.builders.sdxl import write_tiny_sdxl

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
    assert {option.dest for option in options_of(registry.FAMILIES[family].options)} <= known
    first = next(iter(registry.FAMILIES))
    opts = parsing.parse_options(GROUPS, [] if family == first else [f"--{family}"])
    assert traits_of(opts) is registry.FAMILIES[family].traits


@pytest.mark.rows("R257")
@pytest.mark.parametrize(
    ("work", "arguments", "said"),
    [
        (cache_latents, ("--sdxl", "--flux"), "--sdxl and --flux exclude each other; choose one family"),
        (cache_latents, ("--color_aug",), "cannot be used with --color_aug"),
        (cache_latents, ("--sdxl",), "this is a Stable Diffusion 1.x model; a VAE, or an SDXL model, is needed here"),
        (cache_latents, ("--in_json=gone.json",), "--in_json: there is no file 'gone.json'"),
        (cache_latents, ("--flux",), "this is a Stable Diffusion 1.x model; a VAE, or a FLUX model, is needed here"),
        (cache_texts, (), "has no files of text encoder outputs; say what the model is: --sdxl, --sd3, "),
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
    assert "--guidance_scale: has no effect on Stable Diffusion 1.x/2.x" in printed
    assert "1 done" in printed
    assert (place / "a_0064x0064_sd.npz").is_file()


def test_nothing_is_encoded_for_a_folder_that_cannot_be_written_to(folder, tmp_path, capsys, monkeypatch):
    place = tmp_path / "1_thing"
    place.mkdir()
    (place / "a.png").write_bytes((folder / "1_thing" / "a.png").read_bytes())
    (place / "a.caption").write_text("a thing", encoding="utf-8")
    monkeypatch.setattr("library.preparation.common.images._closed", lambda place: "Read-only file system")
    monkeypatch.setattr("library.training.placement.place_vae", pytest.fail)
    monkeypatch.setattr("library.families.sdxl.adapter.SdxlLoader.load", pytest.fail)
    sdxl = write_tiny_sdxl(tmp_path / "sdxl.safetensors")
    for work, model, kind in ((cache_latents, SD, "latents"), (cache_texts, sdxl, "text encoder outputs")):
        line = (f"--train_data_dir={tmp_path}", f"--pretrained_model_name_or_path={model}", "--resolution=64")
        with pytest.raises(SystemExit) as stop:
            run_script(work, GROUPS, [*line, *["--sdxl"] * (model is sdxl)], description="", traits=traits_of)
        assert stop.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"error: {place}: {kind} cannot be written in this folder (Read-only file system)")


def test_a_caption_that_breaks_the_encoder_is_named_and_the_others_are_cached(folder, tmp_path, capsys, monkeypatch):
    place = tmp_path / "1_thing"
    place.mkdir()
    for name in "abc":
        (place / f"{name}.png").write_bytes((folder / "1_thing" / "a.png").read_bytes())
        (place / f"{name}.caption").write_text(f"thing {name}", encoding="utf-8")
    encode = SdxlText.encode

    def broken(self, models, captions):
        rows = torch.tensor([caption == "thing b" for caption in captions])
        nan = float("nan")
        return encode(self, models, captions).map(
            lambda tensor: tensor.masked_fill(rows.view(-1, *[1] * (tensor.ndim - 1)), nan)
        )

    line = (
        *(f"--train_data_dir={tmp_path}", "--sdxl", "--resolution=64", "--text_encoder_batch_size=2"),
        f"--pretrained_model_name_or_path={write_tiny_sdxl(tmp_path / 'sdxl.safetensors')}",
    )
    monkeypatch.setattr(SdxlText, "encode", broken)
    run_script(cache_texts, GROUPS, line, description="", traits=traits_of)
    printed = capsys.readouterr().err
    assert "2 done, 1 failed" in printed
    assert f"failed: {place / 'b.png'}: the text encoder gives NaN" in printed
    assert sorted(path.name for path in place.glob("*.npz")) == ["a_te_outputs.npz", "c_te_outputs.npz"]
    monkeypatch.undo()
    run_script(cache_texts, GROUPS, line, description="", traits=traits_of)
    assert "1 done, 2 skipped" in capsys.readouterr().err
