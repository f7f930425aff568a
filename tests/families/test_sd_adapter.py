"""The SD family's own answers: targets, blocks, text, metadata, early checks. Expected values: formats §1.2, §1.4."""

from __future__ import annotations

import json
import time
from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel

from library.families.sd.adapter import SdFamily
from library.families.sd.targets import block_index, text_targets, unet_targets
from library.families.sd.variants import check_paths
from library.families.shared.recognition import recognise
from library.types import Models
from tests.builders import sd_options, tiny_sd, write_tiny_sd1, write_tiny_sd2
from tests.builders.options import options_for


def real_models(v2: bool) -> Models:
    """The published SD 1.5 / 2.1 configurations, without memory for the weights."""
    width, layers = (1024, 23) if v2 else (768, 12)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            cross_attention_dim=width,
            attention_head_dim=(5, 10, 20, 20) if v2 else 8,
            use_linear_projection=v2,
        )
        text = CLIPTextModel(CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers))
    return Models(unet, {"te": text}, {}, None)


def test_target_counts_of_the_real_models():
    for v2, text_layers in ((False, 72), (True, 138)):
        every = SdFamily(sd_options("", v2=v2)).targets.lora(real_models(v2))
        targets = [target for target in every if not target.optional]
        text, unet = targets[:text_layers], targets[text_layers:]
        assert {t.part for t in text} == {"te"}
        assert {t.part for t in unet} == {"denoiser"}
        assert sum(not t.conv_only for t in unet) == 192
        assert len(unet) == 278
        assert len({t.key for t in every}) == len(every)
        ends = [t.key for t in every if t.optional and not t.norm]
        assert [key.removeprefix("lora_unet_") for key in ends] == [
            *("conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2")
        ]


def test_target_names():
    models = real_models(False)
    by_key = {t.key: t for t in SdFamily(sd_options("")).targets.lora(models)}
    for key in (
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_11_self_attn_out_proj",
        "lora_te_text_model_encoder_layers_5_mlp_fc2",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_2",
        "lora_unet_up_blocks_1_attentions_0_proj_in",
    ):
        assert not by_key[key].conv_only, key
    for key in (
        "lora_unet_down_blocks_3_resnets_0_time_emb_proj",
        "lora_unet_up_blocks_0_resnets_0_conv_shortcut",
        "lora_unet_mid_block_resnets_1_conv1",
        "lora_unet_down_blocks_0_downsamplers_0_conv",
        "lora_unet_up_blocks_0_upsamplers_0_conv",
    ):
        assert by_key[key].conv_only, key
    for target in by_key.values():  # the paths lead to layers of the live models
        part = models.denoiser if target.part == "denoiser" else models.text_encoders["te"]
        kinds = (torch.nn.LayerNorm, torch.nn.GroupNorm) if target.norm else (torch.nn.Linear, torch.nn.Conv2d)
        assert isinstance(part.get_submodule(target.modules[0]), kinds)


def test_text_names_do_not_depend_on_the_text_model_level():
    """Older transformers have the level in the module tree; the file's names are the same."""
    text = real_models(False).text_encoders["te"]
    older = torch.nn.Module()
    older.text_model = text
    assert [t.key for t in text_targets(older)] == [t.key for t in text_targets(text)]
    assert text_targets(older)[0].modules[0].startswith("text_model.")


def test_block_indices():
    """Expected from the numbering of §1.4 and the real U-Net: which of the 25 blocks have how many plain targets."""
    assert block_index("down_blocks.0.resnets.0.conv1") == 1
    assert block_index("down_blocks.2.attentions.1.proj_in") == 8
    assert block_index("down_blocks.1.downsamplers.0.conv") == 6
    assert block_index("mid_block.attentions.0.proj_in") == 12
    assert block_index("up_blocks.0.resnets.2.conv1") == 15
    assert block_index("up_blocks.3.attentions.2.proj_out") == 24
    assert block_index("conv_in") is None
    counts = Counter(t.block for t in unet_targets(real_models(False).denoiser) if not (t.conv_only or t.optional))
    assert counts == dict.fromkeys([1, 2, 4, 5, 7, 8, 12, *range(16, 25)], 12)


def test_blocks_are_in_execution_order():
    models = tiny_sd()
    family = SdFamily(sd_options(""))
    ran: list[torch.nn.Module] = []
    blocks = family.denoiser.blocks(models)
    hooks = [block.register_forward_pre_hook(lambda module, _: ran.append(module)) for block in blocks]
    with torch.no_grad():
        family.denoiser.predict(models, torch.randn(1, 4, 8, 8), torch.tensor([1]), family.text.encode(models, ["a"]))
    for hook in hooks:
        hook.remove()
    assert [id(b) for b in ran] == [id(b) for b in blocks]
    kinds = Counter(type(b).__name__ for b in models.denoiser.modules())
    assert len(blocks) == kinds["ResnetBlock2D"] + kinds["BasicTransformerBlock"]


def test_weighted_captions_multiply_the_states():
    models = tiny_sd()
    plain = SdFamily(sd_options(""))
    weighted = SdFamily(sd_options("", weighted_captions=True))
    with torch.no_grad():
        expected = plain.text.encode(models, ["a red house"]).tensors["context"].clone()
        expected[:, 2] *= 1.5  # BOS, a, red, house
        actual = weighted.text.encode(models, ["a (red:1.5) house"]).tensors["context"]
    assert_close(actual, expected, atol=1e-6, rtol=0)


def test_lengths_of_the_context():
    models = tiny_sd()
    for length, positions in ((None, 77), (75, 77), (150, 152), (225, 227)):
        family = SdFamily(sd_options("", max_token_length=length))
        assert family.text.encode(models, ["a", "b"]).tensors["context"].shape == (2, positions, 64)
    options = options_for("sd", "dreambooth", no_token_padding=True)
    assert SdFamily(options).text.encode(models, ["a b", "c"]).tensors["context"].shape == (2, 4, 64)


def test_text_encoders_train_through_checkpointing():
    models = tiny_sd()
    text_encoder = models.text_encoders["te"].train().requires_grad_(True)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            text_encoder.gradient_checkpointing_enable()
        text_encoder.zero_grad()
        family = SdFamily(sd_options("", clip_skip=2, max_token_length=150))
        family.text.encode(models, ["a red house"]).tensors["context"].square().sum().backward()
        gradients.append({n: p.grad for n, p in text_encoder.named_parameters() if p.grad is not None})
    assert not [n for n in gradients[0] if "layers.2." in n]  # the skipped layer gets none
    assert [n for n in gradients[0] if "layers.0." in n]
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(
    ("v2", "v", "version", "architecture", "resolution"),
    [
        (False, False, "sd_v1", "stable-diffusion-v1", "512x512"),
        (False, True, "sd_v1_v", "stable-diffusion-v1", "512x512"),
        (True, False, "sd_v2", "stable-diffusion-v2-512", "512x512"),
        (True, True, "sd_v2_v", "stable-diffusion-v2-768-v", "768x768"),
    ],
)
def test_metadata(v2, v, version, architecture, resolution):
    family = SdFamily(sd_options("", v2=v2, v_parameterization=v))
    metadata = family.writer.metadata(tiny_sd(v2))
    assert metadata["ss_v2"] is v2
    assert metadata["ss_base_model_version"] == version
    assert metadata["modelspec.architecture"] == architecture
    assert metadata["modelspec.resolution"] == resolution
    assert metadata["modelspec.prediction_type"] == ("v" if v else "epsilon")
    assert family.denoiser.prediction_type() == ("v_prediction" if v else "epsilon")


def test_paths_are_checked_at_once(tmp_path):
    sd1, sd2 = write_tiny_sd1(tmp_path / "1.safetensors"), write_tiny_sd2(tmp_path / "2.safetensors")
    folder = write_tiny_sd2(tmp_path / "folder")
    vae = {k: v for k, v in load_file(sd1).items() if k.startswith("first_stage_model.")}
    save_file(vae, tmp_path / "vae.safetensors")
    start = time.monotonic()
    assert check_paths(sd_options(sd1, vae=str(tmp_path / "vae.safetensors"))) == []
    assert check_paths(sd_options(folder, v2=True, vae=str(folder))) == []
    assert check_paths(sd_options("owner/model")) == []
    assert "add --v2" in check_paths(sd_options(sd2))[0]
    assert "add --v2" in check_paths(sd_options(folder))[0]
    assert "remove --v2" in check_paths(sd_options(sd1, v2=True))[0]
    assert "this is a VAE" in check_paths(sd_options(tmp_path / "vae.safetensors"))[0]
    missing = check_paths(sd_options(tmp_path / "no.safetensors", vae="owner/no.pt"))
    assert [problem.split(":")[0] for problem in missing] == ["--pretrained_model_name_or_path", "--vae"]
    (tmp_path / "page.safetensors").write_text("<html>" * 100)
    assert "this is a web page" in check_paths(sd_options(tmp_path / "page.safetensors"))[0]
    index = {"_class_name": "StableDiffusionXLPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "SDXL" in check_paths(sd_options(folder, v2=True))[0]
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("key", "label"),
    [
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "an SDXL model"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "a Stable Diffusion 3 model"),
        ("double_blocks.0.img_attn.qkv.weight", "a FLUX model"),
        ("lora_unet_mid_block_attentions_0_proj_in.alpha", "a LoRA (or similar network) file"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "a LoRA (or similar network) file"),
        ("emb_params", "a Textual Inversion embedding"),
        ("control_model.input_hint_block.0.weight", "a ControlNet"),
        ("first_stage_model.encoder.conv_in.weight", "a VAE"),
        ("decoder.up_blocks.0.resnets.0.conv1.weight", "a VAE"),
        ("down_blocks.0.resnets.0.conv1.weight", "a Diffusers U-Net by itself"),
        ("weight", "not a model that is known here"),
    ],
)
def test_files_of_other_kinds_are_recognised(key, label, tmp_path):
    assert str(recognise(["time_embed.0.weight", key])) == label
    save_file({key: torch.zeros(1)}, tmp_path / "other.safetensors")
    assert f"this is {label}" in check_paths(sd_options(tmp_path / "other.safetensors"))[0]
