"""Which family a model is of, told from names."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from library import registry
from library.errors import UserError
from library.families.shared.finding import FAMILY_OF, family_of

KEYS = {
    "cond_stage_model.transformer.text_model.x": "sd",
    "cond_stage_model.model.x": "sd",
    "conditioner.embedders.0.x": "sdxl",
    "model.diffusion_model.joint_blocks.0.x": "sd3",
    "joint_blocks.0.x": "sd3",
    "double_blocks.0.x": "flux",
    "model.diffusion_model.double_blocks.0.x": "flux",
}


def test_every_family_can_be_found():
    assert set(FAMILY_OF.values()) == set(KEYS.values()) == set(registry.FAMILIES)


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


def test_what_does_not_tell_its_family(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    for name in ("vae", "vae.safetensors"):
        with pytest.raises(
            UserError, match=r"this is a VAE, which may .* several families; say which one with --family"
        ):
            family_of(str(tmp_path / name))
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: this is not a model that is known here"):
        family_of(str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="no such file or folder"):
        family_of(str(tmp_path / "gone.safetensors"))


def test_a_hub_model_that_is_not_here_cannot_be_asked():
    with pytest.raises(
        UserError, match="owner/model: the hub does not tell what kind of model this is; say it with --family"
    ):
        family_of("owner/model")
