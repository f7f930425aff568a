"""Formats of network files that others wrote are named, and no file is used of which a whole part would be lost."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.types import LoraTarget
from networks import files, third_party
from networks.file_names import require_places, require_types
from tests.networks.builders import lora

FOREIGN = {
    "double_blocks.0.img_attn.qkv.lora_B.bias": "differences of weights or biases; --network_module=networks.lycoris",
    "double_blocks.0.img_attn.norm.query_norm.scale": "a control LoRA, whose model takes an image beside the latents",
    "lora_unet_x.hada_w1_a": "LoHa; --network_module=networks.lycoris",
    "lora_unet_x.lokr_w1": "LoKr",
    "lora_unet_x.lokr_w1_a": "LoKr",
    "lora_unet_x.oft_blocks": "OFT",
    "oft_unet_x.oft_diag": "OFT",
    "lora_unet_x.on_input": "IA3",
    "lora_unet_x.a1.weight": "GLoRA",
    "lora_unet_x.diff": "differences of weights or biases",
    "lora_unet_x.lora_mid.weight": "LoCon in Tucker form",
    "lora_unet_x.dora_scale": "DoRA",
    "model.diffusion_model.out.2.weight": "a whole model",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_named(tmp_path, name):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "0a1b2c")
    with pytest.raises(UserError, match=r"0a1b2c: holds .*which is not LoRA of this kind") as caught:
        lora.read(tmp_path / "0a1b2c")
    assert f": this is {FOREIGN[name]}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_embedding_is_named(tmp_path):
    save_file({"emb_params": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"no file of a network\. Its names are those of a Textual Inversion embedding"):
        lora.read(tmp_path / "a.safetensors")


def test_unknown_content_is_shown(tmp_path):
    save_file({"something.else": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"holds something\.else, which is not LoRA of this kind") as caught:
        lora.read(tmp_path / "a.safetensors")
    assert "this is" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("lora_unet_a.lora_A", "kohya's, lora_unet_<path>.lora_down.weight"),
        ("diffusion_modul.a.b.lora_up.weights", "ComfyUI's, diffusion_model.<path>.lora_up.weight"),
        ("transformers.a.b.lora_A.w", "diffusers' and ai-toolkit's, transformer.<path>.lora_A.weight"),
        ("base_model.model.a.lora_A.bias", "PEFT's, base_model.model.<path>.lora_A.weight"),
        ("a.processor.qkv_lora1.dwn.weight", "xlabs', <path>.processor.qkv_lora1.down.weight"),
    ],
)
def test_unknown_names_are_compared_with_known_layouts(tmp_path, name, layout):
    names = [name, "x.first", "y.second", "z.third"]
    with pytest.raises(UserError) as caught:
        require_types(tmp_path, names)
    assert f"holds {name}" in str(caught.value)
    assert "second, which is" in str(caught.value)  # three of them
    assert str(caught.value).endswith(f"; the nearest layout that is read is {layout}")


def test_embeddings_without_layers_are_named(tmp_path):
    save_file({"bundle_emb.word.clip_l": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"holds no layer of a network\. Its names are those of embeddings without any"):
        lora.read(tmp_path / "a.safetensors")


def test_a_third_party_file_of_another_format_is_named(tmp_path):
    save_file({"a.b.on_input": torch.zeros(2)}, tmp_path / "a.safetensors")
    error = third_party._nothing_fits(files.read(tmp_path / "a.safetensors"), {})
    assert "Its names are those of IA3" in str(error)


KNOWN = {"lora_unet_a", "lora_unet_b", "lora_te1_a", "lora_te2_a"}


@pytest.mark.parametrize(
    "layers",
    [
        ["lora_unet_a", "lora_unet_c"],
        ["lora_unet_a", "lora_te1_a", "lora_te1_z"],
        ["lora_unet_z", "lora_te1_z"],  # nothing at all: the reader says so
        ["lora_unet_a", "something"],
    ],
)
def test_files_that_fit_in_every_part_go_on(tmp_path, layers):
    require_places(tmp_path / "a", layers, KNOWN)


@pytest.mark.parametrize(
    ("layers", "messages"),
    [
        (["lora_te1_a", "lora_unet_y", "lora_unet_z"], [r"its 2 layers lora_unet_\* \(the denoiser\) find no place"]),
        (["lora_unet_a", "lora_te3_x"], [r"its 1 layers lora_te3_\* \(a text encoder\) find no place"]),
        (["lora_unet_a", "lora_te_x"], [r"its 1 layers lora_te_\*"]),
        (["lora_te1_a", "lora_unet_y", "lora_te3_z"], [r"lora_unet_\*", r"lora_te3_\*"]),
        (["lora_te1_a"] + [f"lora_unet_other_{i}" for i in range(40)], [r"its 40 layers lora_unet_\*"]),
    ],
)
def test_a_whole_part_without_a_place_is_an_error(tmp_path, layers, messages):
    with pytest.raises(UserError, match=messages[0]) as caught:
        require_places(tmp_path / "a", layers, KNOWN)
    assert len(caught.value.problems) == len(messages)


def test_files_without_anything_that_fits(tmp_path):
    key = "transformer.single_transformer_blocks.0.attn.to_q"
    save_file({f"{key}.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"none of its 1 layers fits .* first is lora_unet_single_transformer_blocks"):
        files.read(tmp_path / "a.safetensors").matching([LoraTarget("lora_unet_a", "denoiser", ("a",))], lambda _: [2])
