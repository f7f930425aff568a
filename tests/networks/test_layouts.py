"""Network files of other programs. References: files that diffusers and PEFT write, and what their layers compute."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn

from library.errors import UserError
from library.families.sd.targets import text_targets, unet_targets
from library.types import LoraTarget, Models
from networks.build import merge
from networks.files import read
from networks.layouts import kohya_name
from tests.networks import dits
from tests.networks.builders import lora, lora_flux, lora_sd3

NAMES = {
    "lora_unet_a_to_q.lora_down.weight": "lora_unet_a_to_q.lora_down.weight",
    "oft_unet_a.oft_blocks.0": "oft_unet_a.oft_blocks.0",
    "transformer.a.0.to_q.lora_A.weight": "lora_unet_a_0_to_q.lora_down.weight",
    "unet.a.to_out.0.lora_B.default.weight": "lora_unet_a_to_out_0.lora_up.weight",
    "unet.a.to_q.lora.up.weight": "lora_unet_a_to_q.lora_up.weight",
    "text_encoder.text_model.x.q_proj.lora_linear_layer.down.weight": "lora_te1_text_model_x_q_proj.lora_down.weight",
    "text_encoder_2.encoder.block.0.x.lora_A.weight": "lora_te2_encoder_block_0_x.lora_down.weight",
    "base_model.model.double_blocks.0.mlp.2.lora_B.weight": "lora_unet_double_blocks_0_mlp_2.lora_up.weight",
    "diffusion_model.double_blocks.0.img_attn.qkv.alpha": "lora_unet_double_blocks_0_img_attn_qkv.alpha",
    "diffusion_model.x.y.dora_scale": "lora_unet_x_y.dora_scale",
    "unet.x.y.lora_magnitude_vector": "lora_unet_x_y.dora_scale",
    "unet.x.y.lora_magnitude_vector.default.weight": "lora_unet_x_y.dora_scale",
    "double_blocks.3.processor.qkv_lora2.down.weight": "lora_unet_double_blocks_3_txt_attn_qkv.lora_down.weight",
    "double_blocks.3.processor.proj_lora1.up.weight": "lora_unet_double_blocks_3_img_attn_proj.lora_up.weight",
    "down_blocks.0.attn1.processor.to_q_lora.up.weight": "lora_unet_down_blocks_0_attn1_to_q.lora_up.weight",
    "down_blocks.0.attn1.processor.to_out_lora.up.weight": "lora_unet_down_blocks_0_attn1_to_out_0.lora_up.weight",
    "lora_transformer_single_transformer_blocks_0_attn_to_q.lora_down": (
        "lora_unet_single_transformer_blocks_0_attn_to_q.lora_down.weight"
    ),
    "transformer.x.lokr_w1": "lora_unet_x.lokr_w1",
    "lycoris_transformer_blocks_0_attn_to_q.lokr_w1": "lora_unet_transformer_blocks_0_attn_to_q.lokr_w1",
    "lycoris_unet_x.lokr_w1": "lycoris_unet_x.lokr_w1",
    "img_in.lora_A.weight": "lora_unet_img_in.lora_down.weight",
    "txt_in.lora_B.bias": "lora_unet_txt_in.diff_b",
    "final_layer.adaLN_modulation.1.lora_B.weight": "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight",
    "double_blocks.0.img_attn.norm.key_norm.scale": "lora_unet_double_blocks_0_img_attn_norm_key_norm.set_weight",
    "diffusion_model.single_blocks.0.norm.key_norm.scale.set_weight": (
        "lora_unet_single_blocks_0_norm_key_norm.set_weight"
    ),
    "transformer.transformer_blocks.0.attn.norm_added_q.weight": (
        "lora_unet_transformer_blocks_0_attn_norm_added_q.set_weight"
    ),
    "diffusion_model.img_in.reshape_weight": "lora_unet_img_in.reshape_weight",
    "diffusion_model.x.diff_b": "lora_unet_x.diff_b",
    # kohya's beginning with a path behind it, and single words without any: of no known layout
    "lora_unet_a.to_q.lora_A.weight": "lora_unet_a.to_q.lora_A.weight",
    "word.lora_A.weight": "word.lora_A.weight",
    "word.alpha": "word.alpha",
    "lora_unet_a_to_q.lora_A.weight": "lora_unet_a_to_q.lora_down.weight",
    "emb_params": "emb_params",
    "model.diffusion_model.out.2.weight": "model.diffusion_model.out.2.weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_become_kohyas(name):
    assert kohya_name(name) == NAMES[name]


def with_peft(denoiser, paths, *, rank=3, alpha=6, dora=False):
    """A copy with LoRA of PEFT on these modules, with values that change outputs."""
    changed = copy.deepcopy(denoiser)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(paths), use_dora=dora)
    inject_adapter_in_model(config, changed)
    with torch.no_grad():
        rng = torch.Generator().manual_seed(3)
        for name, parameter in changed.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=rng)
    return changed.eval(), config


@pytest.mark.parametrize("dora", [False, True])
def test_a_file_that_diffusers_writes(models, outputs, tmp_path, dora):
    """Rank 3 and alpha 6, which is in the file's metadata alone."""
    from diffusers import StableDiffusionPipeline

    targets = unet_targets(models.denoiser) + text_targets(models.text_encoders["te"])
    linears = [
        t.modules[0]
        for t in targets
        if t.part == "denoiser"
        and isinstance(models.denoiser.get_submodule(t.modules[0]), nn.Linear)
        and not t.optional
    ]
    changed, config = with_peft(models.denoiser, linears, dora=dora)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(changed),
        unet_lora_adapter_metadata={**config.to_dict(), "target_modules": sorted(linears)},
    )
    file = read(tmp_path / "pytorch_lora_weights.safetensors")
    bare = outputs(models)[0]
    expected = outputs(Models(changed, models.text_encoders, {}, None))[0]
    assert (expected - bare).abs().max() > 1e-2
    assert merge(targets, models, file, 1.0) == (len(linears), 0)
    torch.testing.assert_close(outputs(models)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_pieces_of_fused_layers_become_one(family, tmp_path):
    """Diffusers' names: query, key and value one by one, where the public layout has one layer."""
    torch.manual_seed(0)
    models = getattr(dits, family)()
    targets = [t for t in getattr(dits, f"{family}_targets")(models) if t.part == "denoiser" and not t.optional]
    paths = [path for target in targets for path in target.modules]
    changed, _ = with_peft(models.denoiser, paths, alpha=3)
    state = {f"transformer.{name}": tensor for name, tensor in get_peft_model_state_dict(changed).items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "a.safetensors")
    output = getattr(dits, f"{family}_output")
    expected, bare = output(changed), output(models.denoiser)
    assert (expected - bare).abs().max() > 1e-2
    builder = lora_flux if family == "flux" else lora_sd3
    file = builder.read(tmp_path / "a.safetensors")
    network = builder.from_weights(targets, models, file, args={})
    network.attach(models)
    torch.testing.assert_close(output(models.denoiser), expected, rtol=1e-4, atol=1e-4)
    network.detach()
    assert merge(targets, models, file, 1.0)[0] == len(targets)
    torch.testing.assert_close(output(models.denoiser), expected, rtol=1e-4, atol=1e-4)


def test_some_pieces_of_a_fused_layer(tmp_path):
    parts = nn.ModuleDict({name: nn.Linear(6, 4) for name in ("to_q", "to_k", "to_v")})
    models, target = Models(parts, {}, {}, None), LoraTarget("lora_unet_qkv", "denoiser", ("to_q", "to_k", "to_v"))
    down, up = torch.randn(2, 6), torch.randn(4, 2)
    pair = {"unet.to_k.lora_A.weight": down.bfloat16(), "unet.to_k.lora_B.weight": up.bfloat16()}
    save_file({**pair, "unet.to_k.alpha": torch.tensor(3.0)}, tmp_path / "a.safetensors")
    down, up = down.bfloat16().float(), up.bfloat16().float() * 3 / 2
    x = torch.randn(3, 6)
    q, k, v = (parts[name](x) for name in parts)
    network = lora.from_weights([target], models, lora.read(tmp_path / "a.safetensors"), args={})
    network.attach(models)
    torch.testing.assert_close(parts["to_k"](x), k + x @ down.T @ up.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(parts["to_q"](x), q)
    assert torch.equal(parts["to_v"](x), v)
    save_file({f"unet.to_k.hada_w{end}": torch.zeros(2, 2) for end in ("1_a", "1_b", "2_a", "2_b")}, tmp_path / "b.pt")
    with pytest.raises(UserError, match=r"lora_unet_qkv: shape \(2, 2\) does not fit \(4, 6\)"):
        merge([target], models, read(tmp_path / "b.pt"), 1.0)
