"""What networks adapt in FLUX.1, under the names of published LoRA files."""

from __future__ import annotations

from types import CodeType

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.loaders import lora_conversion_utils
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from library.families.flux.adapter import FluxFamily
from tests.builders.flux import WIDTH, flux_options, write_flux, write_parts
from tests.networks.builders import lora_flux


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


def load(folder, parts, variant="dev"):
    family = FluxFamily(flux_options(write_flux(folder, variant), **parts, t5xxl_max_token_length=12))
    return family, family.loader.load()


def test_targets_are_the_published_layers(tmp_path, parts):
    family, models = load(tmp_path, parts)
    every = family.targets.lora(models)
    targets = [target for target in every if not target.from_file]
    by_key = {target.key: target for target in targets}
    assert len({target.key for target in every}) == len(every)
    norms = [
        f"double_blocks_{i}_{x}_attn_norm_{y}_norm" for i in range(2) for x in ("img", "txt") for y in ("query", "key")
    ]
    norms += [f"single_blocks_{i}_norm_{y}_norm" for i in range(2) for y in ("query", "key")]
    of_control_loras = ["final_layer_linear", "final_layer_adaLN_modulation_1", *norms]
    assert [t.key.removeprefix("lora_unet_") for t in every if t.from_file] == of_control_loras
    block = [
        "img_mod_lin", "img_attn_qkv", "img_attn_proj", "img_mlp_0", "img_mlp_2",
        "txt_mod_lin", "txt_attn_qkv", "txt_attn_proj", "txt_mlp_0", "txt_mlp_2",
    ]  # fmt: skip
    wanted = [f"lora_unet_double_blocks_{i}_{layer}" for i in range(2) for layer in block]
    wanted += [f"lora_unet_single_blocks_{i}_{x}" for i in range(2) for x in ("linear1", "linear2", "modulation_lin")]
    plain = [t.key for t in targets if t.part == "denoiser" and not t.optional]
    assert plain == wanted
    optional = [t.key.removeprefix("lora_unet_") for t in targets if t.part == "denoiser" and t.optional]
    assert optional == [
        "img_in", "time_in_in_layer", "time_in_out_layer", "vector_in_in_layer", "vector_in_out_layer",
        "guidance_in_in_layer", "guidance_in_out_layer", "txt_in",
    ]  # fmt: skip
    assert by_key["lora_unet_single_blocks_1_linear1"].modules == tuple(
        f"single_transformer_blocks.1.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    )
    assert by_key["lora_unet_double_blocks_0_txt_attn_qkv"].modules == tuple(
        f"transformer_blocks.0.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")
    )
    assert "lora_te1_text_model_encoder_layers_1_mlp_fc2" in by_key
    te3 = [target for target in targets if target.part == "te3"]
    assert all(target.optional for target in te3)
    assert te3[0].key == "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    assert [t.part for t in targets] == ["te1"] * 12 + ["te3"] * 14 + ["denoiser"] * 34
    for target in targets:
        part = models.denoiser if target.part == "denoiser" else models.text_encoders[target.part]
        assert all(isinstance(part.get_submodule(path), nn.Linear) for path in target.modules)


def test_every_linear_layer_but_the_final_one_is_a_target(tmp_path, parts):
    family, models = load(tmp_path, parts)
    targets = [target for target in family.targets.lora(models) if target.part == "denoiser" and not target.from_file]
    covered = {path for target in targets for path in target.modules}
    layers = {name for name, module in models.denoiser.named_modules() if isinstance(module, nn.Linear)}
    assert layers - covered == {"proj_out", "norm_out.linear"}


def test_schnell_has_no_layers_for_guidance(tmp_path, parts):
    family, models = load(tmp_path, parts, "schnell")
    assert not any("guidance" in target.key for target in family.targets.lora(models))


@pytest.fixture
def diffusers_of_our_width(monkeypatch):
    """Its reader of LoRA files has linear1's rows at the real width as a constant; here it is the tiny model's."""
    real, ours = (3072, 3072, 3072, 12288), (WIDTH, WIDTH, WIDTH, 4 * WIDTH)

    def changed(code):
        constants = (changed(c) if isinstance(c, CodeType) else ours if c == real else c for c in code.co_consts)
        return code.replace(co_consts=tuple(constants))

    reader = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers
    monkeypatch.setattr(reader, "__code__", changed(reader.__code__))


@pytest.mark.usefixtures("diffusers_of_our_width")
@pytest.mark.parametrize("args", [{}, {"in_dims": "[2,2,2,2,2]"}, {"split_qkv": "True"}], ids=str)
@torch.no_grad()
def test_our_files_do_the_same_in_diffusers(tmp_path, parts, args):
    """Fused layers included: query, key and value share one entry, linear1 has the feed-forward too."""
    family, models = load(tmp_path, parts)
    file = tmp_path / "network.safetensors"
    latents, times = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(2)), torch.tensor([600.0])

    def results(models):
        cond = family.text.encode(models, ["a red house"])
        return cond.tensors["l_pooled"], family.denoiser.predict(models, latents, times, cond)

    before = results(models)
    network = trained_network(family, models, args)
    save_file({name: tensor.contiguous() for name, tensor in network.file_state().items()}, file)
    network.attach(models)
    pooled, prediction = results(models)
    assert (pooled - before[0]).abs().max() > 0.05
    assert (prediction - before[1]).abs().max() > 0.05
    theirs = in_diffusers(load(tmp_path, parts)[1], file)
    for ours, other in zip((pooled, prediction), results(theirs), strict=True):
        assert_close(ours, other, atol=1e-4, rtol=0)


def trained_network(family, models, args):
    network = lora_flux.create(
        family.targets.lora(models), models, dim=4, alpha=2.0, dropout=None, args=args, seed=1
    ).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def in_diffusers(models, file):
    """The models with a file's layers, by diffusers. It reads those outside the blocks, but leaves them aside."""
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=models.vae,
        text_encoder=models.text_encoders["te1"],
        tokenizer=models.tokenizers["te1"],
        text_encoder_2=models.text_encoders["te3"],
        tokenizer_2=models.tokenizers["te3"],
        transformer=models.denoiser,
    )
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    state = FluxPipeline.lora_state_dict(file.parent, weight_name=file.name)
    outside = [key.removesuffix(".lora_A.weight") for key in state if not key.startswith(("transformer.", "text_enc"))]
    for name in outside:
        if not name.endswith(".lora_B.weight"):
            weight = models.denoiser.get_submodule(name).weight
            weight += state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
    return models
