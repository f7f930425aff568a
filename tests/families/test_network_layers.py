"""Network files of another family are recognised by the names of their layers, before a model is read."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from library import checking
from library.families.sd.targets import unet_targets as sd_targets
from library.families.sdxl.targets import unet_targets as sdxl_targets
from library.registry import FAMILIES
from networks.files import names_of
from tests.builders.options import options_for
from tests.families.test_sd_adapter import real_models as real_sd
from tests.families.test_sdxl_adapter import real_models as real_sdxl

# A layer of each family in the names that programs write.
LAYERS = {
    "sd": [
        "lora_unet_down_blocks_0_attentions_1_proj_in.alpha",
        "lora_unet_input_blocks_2_1_transformer_blocks_0_attn1_to_q.lora_up.weight",
        "diffusion_model.output_blocks.11.1.proj_out.lora_up.weight",
        "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_k.lora_A.weight",
        "lycoris_unet_up_blocks_3_attentions_0_proj_in.lokr_w1",
    ],
    "sdxl": [
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_v.lora_down.weight",
        "oft_unet_middle_block_1_transformer_blocks_3_attn1_to_q.oft_blocks",
        "diffusion_model.output_blocks.4.1.transformer_blocks.1.ff.net.2.lora_up.weight",
        "unet.mid_block.attentions.0.transformer_blocks.5.attn1.to_k.lora.up.weight",
    ],
    "sd3": [
        "lora_unet_joint_blocks_3_x_block_attn_qkv.lora_down.weight",
        "diffusion_model.joint_blocks.0.context_block.mlp.fc1.lora_up.weight",
    ],
    "flux": [
        "lora_unet_double_blocks_18_img_attn_proj.lora_down.weight",
        "transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight",
        "double_blocks.1.processor.qkv_lora1.down.weight",
        "diffusion_model.single_blocks.0.linear1.lora_up.weight",
        "lora_transformer_single_transformer_blocks_0_attn_to_q.lora_down.weight",
    ],
}
UNDECIDED = ["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "lora_unet_mid_block_attentions_0_proj_in.alpha"]


def problems(family, tmp_path, names, how="network_weights"):
    path = tmp_path / "a.safetensors"
    save_file({name: torch.zeros(1) for name in names}, path)
    opts = options_for(family, "network", **{how: str(path) if how == "network_weights" else [str(path)]})
    return checking._networks_of_others(opts, FAMILIES[family])


@pytest.mark.parametrize("how", ["network_weights", "base_weights"])
@pytest.mark.parametrize("here", LAYERS)
@pytest.mark.parametrize("made_for", LAYERS)
def test_a_file_of_another_family_names_it(tmp_path, here, made_for, how):
    for name in LAYERS[made_for]:
        found = problems(here, tmp_path, [name, *UNDECIDED], how)
        if here == made_for:
            assert found == [], name
            continue
        (line,) = found
        label, own = FAMILIES[made_for].traits.label, FAMILIES[here].traits.label
        assert line.startswith(f"{tmp_path}/a.safetensors: is a network for {label}, and the model here is {own}; use ")
        assert "train_network.py, or another file" in line


def test_files_that_show_no_family_go_on(tmp_path):
    assert problems("sd", tmp_path, [*UNDECIDED, "something.else", "lora_unet_blocks_1_attn_q.alpha"]) == []


def test_real_models_are_their_own_family_only():
    """Every name that any layer of SD 1.x, SD 2.x or SDXL may have."""
    for family, targets in {
        "sd": [*sd_targets(real_sd(False).denoiser), *sd_targets(real_sd(True).denoiser)],
        "sdxl": sdxl_targets(real_sdxl().denoiser),
    }.items():
        names = "\n".join(name for target in targets for name in names_of(target))
        fitting = [name for name, spec in FAMILIES.items() if re.search(spec.network_layers, names)]
        assert fitting == [family]
