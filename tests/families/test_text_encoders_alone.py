"""Text encoders without the rest of a model: the same texts, no weights of the denoiser, and less to fetch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.families.flux import variants as flux_variants
from library.families.flux.adapter import FluxFamily
from library.families.sd3 import variants as sd3_variants
from library.families.sd3.adapter import Sd3Family
from library.families.sdxl.adapter import SdxlFamily
from tests.builders.flux import flux_options, write_flux, write_parts
from tests.builders.sd3 import sd3_options, write_encoder_file, write_tiny_sd3
from tests.builders.sdxl import sdxl_options, write_tiny_sdxl
from tests.builders.t5 import write_t5_tokenizer

CAPTIONS = ["a red house", ""]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))


def flux(folder: Path) -> FluxFamily:
    return FluxFamily(flux_options(write_flux(folder), **write_parts(folder)))


def stable_diffusion_3(folder: Path) -> Sd3Family:
    write_t5_tokenizer(folder / "google_t5-v1_1-xxl")
    path = write_tiny_sd3(folder / "sd3.safetensors", encoders=("te1", "te2", "te3"))
    return Sd3Family(sd3_options(path, cache=str(folder)))


def without_t5(folder: Path) -> Sd3Family:
    return Sd3Family(sd3_options(write_tiny_sd3(folder / "sd3.safetensors", encoders=("te1", "te2"))))


def sdxl(folder: Path) -> SdxlFamily:
    return SdxlFamily(sdxl_options(write_tiny_sdxl(folder / "sdxl.safetensors")))


def assert_same_texts(family, other) -> None:
    models, whole = family.loader.load(texts_only=True), other.loader.load()
    assert models.vae is None
    if models.denoiser is not None:
        assert all(weight.is_meta for weight in models.denoiser.parameters()), "weights of the denoiser were read"
    ours, expected = family.text.encode(models, CAPTIONS).tensors, other.text.encode(whole, CAPTIONS).tensors
    assert ours.keys() == expected.keys()
    for name in expected:
        assert torch.equal(ours[name], expected[name]), name
    assert family.text.layout(models) == other.text.layout(whole)


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("make", [flux, stable_diffusion_3, without_t5, sdxl])
def test_texts_are_those_of_the_whole_model(make, as_folder, tmp_path):
    family = make(tmp_path)
    if as_folder:
        name = tmp_path / "folder"
        family.writer.save(family.loader.load(), name, save_as="diffusers_safetensors", dtype=None, metadata={})
        family = type(family)(family.opts.replaced(pretrained_model_name_or_path=str(name)))
        for part in ("transformer", "unet", "vae"):
            for weights in (name / part).glob("*.safetensors"):
                shutil.move(weights, weights.with_suffix(".away"))
        family.loader.load(texts_only=True)
        for weights in name.glob("*/*.away"):
            shutil.move(weights, weights.with_suffix(".safetensors"))
    assert_same_texts(family, type(family)(family.opts))


def test_files_of_text_encoders_need_no_model(tmp_path):
    whole = flux(tmp_path)
    files = {name: value for name, value in write_parts(tmp_path).items() if name != "ae"}
    alone = FluxFamily(flux_options("", **files, t5xxl_max_token_length=512))
    assert flux_variants.check_text_paths(alone.opts) == []
    assert_same_texts(alone, whole)


def test_files_of_sd3s_text_encoders_need_no_model(tmp_path):
    write_t5_tokenizer(tmp_path / "google_t5-v1_1-xxl")
    names = {"te1": "clip_l", "te2": "clip_g", "te3": "t5xxl"}
    files = {name: write_encoder_file(tmp_path / f"{name}.safetensors", part) for part, name in names.items()}
    alone = Sd3Family(sd3_options("", cache=str(tmp_path), **files))
    assert sd3_variants.check_text_paths(alone.opts) == []
    assert sd3_variants.missing_encoders(alone.opts) == []
    assert_same_texts(
        alone, Sd3Family(sd3_options(write_tiny_sd3(tmp_path / "a.safetensors"), cache=str(tmp_path), **files))
    )


@pytest.mark.parametrize(
    ("check", "options", "given", "said"),
    [
        (flux_variants, flux_options, {}, "name a model: a file, a Diffusers folder or a hub id; or its text encoders"),
        (flux_variants, flux_options, {"clip_l": "clip_l"}, "--t5xxl: needed where no model is named"),
        (flux_variants, flux_options, {"clip_l": "clip_l", "t5xxl": "t5"}, "--t5xxl_max_token_length: needed where"),
        (sd3_variants, sd3_options, {}, "or its text encoders, with --clip_l, --clip_g, --t5xxl"),
        (sd3_variants, sd3_options, {"clip_g": "clip_g"}, "--clip_l: needed where no model is named"),
    ],
)
def test_what_is_missing_is_reported(check, options, given, said):
    assert said in "\n".join(check.check_text_paths(options("", **given)))


def test_an_autoencoder_is_not_asked_for(tmp_path):
    parts = write_parts(tmp_path)
    opts = flux_options(write_flux(tmp_path), **{name: parts[name] for name in ("clip_l", "t5xxl")})
    assert flux_variants.check_text_paths(opts) == []
    assert "--ae: needed" in "\n".join(flux_variants.check_paths(opts))


def test_a_hub_model_of_which_only_the_texts_are_here(tmp_path, monkeypatch):
    """What was not fetched for texts is fetched for the whole model: that the cache has a folder is not enough."""
    family, hub = flux(tmp_path), tmp_path / "hub" / "models--someone--flux"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("abc")
    family.writer.save(
        family.loader.load(), hub / "snapshots" / "abc", save_as="diffusers_safetensors", dtype=None, metadata={}
    )
    for part in ("transformer", "vae"):
        for weights in (hub / "snapshots" / "abc" / part).glob("*.safetensors"):
            weights.unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    there = FluxFamily(flux_options("someone/flux"))
    assert there.loader.load(texts_only=True).text_encoders.keys() == {"te1", "te3"}
    with pytest.raises(UserError, match="someone/flux: not all weights of transformer and vae are in the hub"):
        there.loader.load()
