"""Which family a model is of, told from names."""

from __future__ import annotations

import json
from unittest.mock import Mock

import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file

from library import registry
from library.errors import UserError
from library.families.shared.finding import family_of
from library.families.shared.reading import from_pretrained

KEYS = {
    "cond_stage_model.transformer.text_model.x": "sd",
    "cond_stage_model.model.x": "sd",
    "conditioner.embedders.0.x": "sdxl",
    "model.diffusion_model.joint_blocks.0.x": "sd3",
    "joint_blocks.0.x": "sd3",
    "double_blocks.0.x": "flux",
    "model.diffusion_model.double_blocks.0.x": "flux",
}


def test_files_of_every_family_are_among_the_cases():
    assert set(KEYS.values()) == set(registry.FAMILIES)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_the_family_of_a_file(tmp_path, key, suffix):
    path, tensors = tmp_path / f"model{suffix}", {key: torch.zeros(1), "first_stage_model.decoder.x": torch.zeros(1)}
    if suffix == ".ckpt":
        torch.save({"state_dict": tensors}, path)
    else:
        save_file(tensors, path)
    assert family_of(str(path)) == KEYS[key]


@pytest.mark.parametrize(
    ("class_name", "parts", "family"),
    [
        ("StableDiffusionPipeline", ("unet", "text_encoder"), "sd"),
        (None, ("unet", "text_encoder"), "sd"),
        ("StableDiffusionXLPipeline", ("unet", "text_encoder_2"), "sdxl"),
        (None, ("unet", "text_encoder_2"), "sdxl"),
        ("StableDiffusion3Pipeline", ("transformer",), "sd3"),
        ("FluxPipeline", ("transformer",), "flux"),
    ],
)
def test_the_family_of_a_folder(tmp_path, class_name, parts, family):
    for part in parts:
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    if class_name is not None:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    assert family_of(str(tmp_path)) == family


def test_what_does_not_name_its_family(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL", "latent_channels": 16}')
    save_file({"decoder.conv_in.weight": torch.zeros(1, 16, 3, 3)}, tmp_path / "vae.safetensors")
    for name in ("vae", "vae.safetensors"):
        with pytest.raises(UserError, match=r"this is a VAE, which may .* several families; choose one with --family"):
            family_of(str(tmp_path / name))
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: this is not a model that is known here"):
        family_of(str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="no such file or folder"):
        family_of(str(tmp_path / "gone.safetensors"))


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("name", ["vae.safetensors", "vae.pt", "0a1b2c"])
def test_a_vae_by_itself_is_one_of_the_first_models(tmp_path, prefix, name):
    tensors = {f"{prefix}decoder.conv_in.weight": torch.zeros(1, 4, 3, 3)}
    torch.save(tensors, tmp_path / name) if name.endswith(".pt") else save_file(tensors, tmp_path / name)
    assert family_of(str(tmp_path / name)) == "sd"


def test_a_vae_folder_is_one_of_the_first_models(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert family_of(str(tmp_path)) == "sd"


def test_a_hub_out_of_reach_is_asked_once(monkeypatch):
    """The clients that fetch files would ask several times, and wait in between, before they say so."""
    asked, fetched = [], []

    def ask(self, name, **options):
        asked.append(name)
        raise ConnectionError("nobody there")

    def fetch(name, file, *, local_files_only=False, **options):
        fetched.append(local_files_only)
        raise OSError("not in the cache")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", ask)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr(
        "diffusers.AutoencoderKL.from_pretrained",
        lambda name, *, local_files_only, **options: fetch(name, "", local_files_only=local_files_only),
    )
    with pytest.raises(UserError, match=r"for the kind of model \(nobody there\); set --family"):
        family_of("owner/model")
    with pytest.raises(UserError, match=r"owner/model/vae: .* the hub does not provide it \(nobody there\)"):
        from_pretrained(AutoencoderKL, "owner/model", "vae")
    assert asked == ["owner/model"] * 2
    assert all(fetched)


@pytest.mark.parametrize("answer", [HfHubHTTPError("404", response=Mock()), ValueError("a mirror")])
def test_a_hub_that_answers_and_does_not_name(monkeypatch, answer):
    def ask(self, name, **options):
        raise answer

    def fetch(name, file, **options):
        raise OSError("no such file")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", ask)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    with pytest.raises(UserError, match="owner/model: the hub does not say what kind of model this is; set --family"):
        family_of("owner/model")
