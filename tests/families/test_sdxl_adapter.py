"""The SDXL family's own answers: text, targets, blocks, options, LoRA in diffusers. Expected: formats §1.3, §1.4, §8"""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.caching.encode_missing import Encoder
from library.caching.text import TextRequest, cache_on_disk
from library.families.sdxl.adapter import SdxlFamily
from library.families.sdxl.options import TRAITS
from library.families.sdxl.targets import block_index, unet_targets
from library.families.shared.targets import clip_targets
from library.options.parsing import parse_options
from library.options.validation import problems, warnings
from library.registry import groups_for
from library.types import Models
from networks import files
from networks.targets import rows_of
from tests.builders.sdxl import sdxl_options, tiny_sdxl, write_tiny_sdxl
from tests.networks.builders import lora


@pytest.fixture(scope="module")
def models() -> Models:
    return tiny_sdxl()


def real_models() -> Models:
    """The published configurations, without memory for the weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        te1 = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))
        te2 = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
        )
    return Models(unet, {"te1": te1, "te2": te2}, {}, None)


# ---- text


def test_long_captions_are_encoded_chunk_by_chunk(models):
    """Reference: transformers, on the three chunks that formats show for 100 tokens; the second encoder pads with 0."""
    family = SdxlFamily(sdxl_options("", max_token_length=225))
    caption = " ".join(["house"] * 100)
    (word,) = models.tokenizers["te1"]("house", add_special_tokens=False).input_ids
    bos, eos = 49406, 49407
    with torch.no_grad():
        ours = family.text.encode(models, [caption]).tensors
        for name, key, pad in (("te1", "hidden_state1", eos), ("te2", "hidden_state2", 0)):
            chunks = [
                [bos] + [word] * 75 + [eos],
                [bos] + [word] * 25 + [eos] + [pad] * 50,
                [bos, eos] + [pad] * 75,
            ]
            found = models.text_encoders[name](torch.tensor(chunks), output_hidden_states=True)
            states = found.hidden_states[-2]
            expected = torch.cat([states[0, :1], *states[:, 1:-1], states[2, -1:]])
            assert_close(ours[key][0], expected, atol=1e-5, rtol=0)
            assert ours[key].shape[1] == 227
    assert_close(ours["pool2"], found.text_embeds[:1], atol=1e-5, rtol=0)  # of the first chunk


def test_the_layer_is_counted_from_the_end_and_clip_skip_has_no_effect(models):
    plain, skipping = SdxlFamily(sdxl_options("")), SdxlFamily(sdxl_options("", clip_skip=1))
    ids = models.tokenizers["te1"](["a cat"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        one, other = (family.text.encode(models, ["a cat"]).tensors for family in (plain, skipping))
        hidden = models.text_encoders["te1"](ids, output_hidden_states=True).hidden_states
    assert_close(one["hidden_state1"], hidden[2], atol=1e-5, rtol=0)  # of 3 layers; of 12 layers it is hidden[11]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_pooling_does_not_rely_on_the_id_of_eos_in_the_config(models):
    """Published folders say 2, by which transformers takes the largest id: with added words, the wrong place."""
    family, te2 = SdxlFamily(sdxl_options("")), models.text_encoders["te2"]
    with torch.no_grad():
        expected = family.text.encode(models, ["a cat"]).tensors["pool2"]
        before, te2.text_model.eos_token_id = te2.text_model.eos_token_id, 2
        try:
            assert torch.equal(family.text.encode(models, ["a cat"]).tensors["pool2"], expected)
        finally:
            te2.text_model.eos_token_id = before


def test_weighted_captions_multiply_the_states_but_not_the_pooled_text(models):
    plain, weighted = SdxlFamily(sdxl_options("")), SdxlFamily(sdxl_options("", weighted_captions=True))
    with torch.no_grad():
        expected = {name: t.clone() for name, t in plain.text.encode(models, ["a red house"]).tensors.items()}
        actual = weighted.text.encode(models, ["a (red:1.5) house"]).tensors
        asked = plain.text.encode(models, ["a (red:1.5) house"], emphasis=True).tensors
    for name in ("hidden_state1", "hidden_state2"):
        expected[name][:, 2] *= 1.5  # BOS, a, red, house
    for name, value in expected.items():
        assert_close(actual[name], value, atol=1e-6, rtol=0)
        assert torch.equal(asked[name], actual[name])


def test_cached_text_has_the_conditionings_names(models):
    family = SdxlFamily(sdxl_options(""))
    layout = family.text.layout()
    assert layout.suffix == "_te_outputs.npz"
    assert set(layout.keys) == set(family.text.encode(models, ["a"]).tensors)


def test_text_files_of_earlier_trainers_are_made_again(models, tmp_path, caplog, monkeypatch):
    """Their pooled text went through the projection the wrong way round."""
    family = SdxlFamily(sdxl_options(""))
    item = TextRequest(image=tmp_path / "a.png", caption="a cat")
    item.image.touch()
    wanted = {name: rows[0].numpy() for name, rows in family.text.encode(models, ["a cat"]).tensors.items()}
    file = tmp_path / "a_te_outputs.npz"
    np.savez(file, **wanted | {"pool2": wanted["pool2"][::-1]})
    monkeypatch.setattr(logging.getLogger("trainscripts"), "propagate", True)
    encoder = Encoder(partial(family.text.encode, models), 1)
    kept = cache_on_disk([item], family.text.layout(), encoder, {})
    assert "made by another trainer" in caplog.text
    assert_close(kept.get(0)["pool2"].numpy(), wanted["pool2"], atol=1e-6, rtol=0)
    caplog.clear()
    cache_on_disk([item], family.text.layout(), encoder, {})
    assert "encoded again" not in caplog.text


# ---- targets and blocks


def test_target_counts_of_the_real_models():
    targets = SdxlFamily(sdxl_options("")).targets.lora(real_models())
    counts = Counter((t.part, t.conv_only) for t in targets if not t.optional)
    assert counts == {("te1", False): 72, ("te2", False): 192, ("denoiser", False): 722, ("denoiser", True): 66}
    assert len({t.key for t in targets}) == len(targets)
    assert all(t.norm or t.from_file for t in targets if t.optional)


def test_target_names():
    models = real_models()
    by_key = {t.key: t for t in SdxlFamily(sdxl_options("")).targets.lora(models)}
    for key in (
        "lora_te1_text_model_encoder_layers_11_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_31_mlp_fc2",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_out_0",
        "lora_unet_middle_block_1_proj_in",
        "lora_unet_output_blocks_0_1_transformer_blocks_9_ff_net_0_proj",
        "lora_unet_output_blocks_5_1_proj_out",
    ):
        assert not by_key[key].conv_only, key
    for key in (
        "lora_unet_input_blocks_1_0_in_layers_2",
        "lora_unet_input_blocks_4_0_skip_connection",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_input_blocks_6_0_op",
        "lora_unet_middle_block_2_out_layers_3",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_output_blocks_5_2_conv",
        "lora_unet_output_blocks_8_0_emb_layers_1",
    ):
        assert by_key[key].conv_only, key
    for target in by_key.values():  # the paths lead to layers of the live models
        part = models.denoiser if target.part == "denoiser" else models.text_encoders[target.part]
        kinds = (torch.nn.LayerNorm, torch.nn.GroupNorm) if target.norm else (torch.nn.Linear, torch.nn.Conv2d)
        assert isinstance(part.get_submodule(target.modules[0]), kinds)


def test_block_indices():
    assert block_index("input_blocks.0.0") == 1
    assert block_index("input_blocks.8.1.proj_in") == 9
    assert block_index("middle_block.0.in_layers.2") == 10
    assert block_index("middle_block.2.in_layers.2") == 12
    assert block_index("output_blocks.8.0.in_layers.2") == 21
    assert block_index("output_blocks.9.0.in_layers.2") is None
    assert block_index("time_embed.0") is None
    counts = Counter(t.block for t in unet_targets(real_models().denoiser) if not (t.conv_only or t.optional))
    assert set(counts) == {5, 6, 8, 9, 11, *range(13, 19)}
    assert TRAITS.block_layout.total == 23


def test_blocks_are_in_execution_order(models):
    family = SdxlFamily(sdxl_options(""))
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


@pytest.mark.rows("R294")
def test_block_wise_ranks_and_rates(models):
    targets = [target for target in unet_targets(models.denoiser) if not target.optional]
    dims = ",".join(str(2 + n % 3) for n in range(23))
    network = lora.create(
        targets, models, dim=4, alpha=1, dropout=None, args={"block_dims": dims}, seed=0, layout=TRAITS.block_layout
    )
    ranks = {target.block: 2 + target.block % 3 for target in targets if not target.conv_only}
    assert len(ranks) == 11
    for key, layer in network.layers().items():
        assert layer.rank == ranks[network.targets[key].block]

    weights = {"down_lr_weight": "1,1,1,1,0.5,1,1,1,1", "mid_lr_weight": "0,0.25,0", "up_lr_weight": "zeros+2"}
    network = lora.create(
        targets, models, dim=4, alpha=1, dropout=None, args=weights, seed=0, layout=TRAITS.block_layout
    )
    rates = {group["name"]: group["lr"] for group in network.parameter_groups({"denoiser": 1e-3})}
    expected = {5: 0.5, 6: 1.0, 8: 1.0, 9: 1.0, 11: 0.25} | dict.fromkeys(range(13, 19), 2.0)
    assert rates == {f"unet block {block}": pytest.approx(1e-3 * weight) for block, weight in expected.items()}


# ---- LoRA files


@pytest.fixture(scope="module")
def trained_lora(models, tmp_path_factory):
    """A network whose up matrices have values, and its file."""
    family = SdxlFamily(sdxl_options(""))
    args = {"conv_dim": "4"}
    network = lora.create(family.targets.lora(models), models, dim=4, alpha=2, dropout=None, args=args, seed=0)
    rng = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if "lora_up" in name:
            parameter.data.normal_(0, 0.05, generator=rng)
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file({name: tensor.detach().contiguous() for name, tensor in network.file_state().items()}, path)
    return network, path


def test_a_lora_of_ours_in_diffusers(models, trained_lora, tmp_path, caplog):
    """Its own pipeline with the file, against our models with the network; float32, 1e-4."""
    network, path = trained_lora
    pipeline = StableDiffusionXLPipeline.from_pretrained(write_tiny_sdxl(tmp_path / "pipe"), local_files_only=True)
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
    assert [r.message for r in caplog.records if "key" in r.message.lower()] == []
    noisy, times = torch.randn(1, 4, 8, 8), torch.tensor([300])
    family = SdxlFamily(sdxl_options(""))

    def ours() -> torch.Tensor:
        return family.denoiser.predict(models, noisy, times, family.text.encode(models, ["a red house"]))

    with torch.no_grad():
        bare = ours()
        network.eval()
        network.attach(models)
        adapted = ours()
        network.detach()
        states, _, pooled, _ = pipeline.encode_prompt("a red house", do_classifier_free_guidance=False)
        ids = pipeline._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, text_encoder_projection_dim=64)
        added = {"text_embeds": pooled, "time_ids": ids}
        theirs = pipeline.unet(noisy, times, states, added_cond_kwargs=added).sample
    assert (adapted - bare).abs().max() > 1e-2, "the LoRA does something"
    assert_close(adapted, theirs, atol=1e-4, rtol=0)


UP = "lora_up.weight"


def test_files_with_diffusers_names_are_read(models, trained_lora, tmp_path):
    """Some trainers write diffusers' names for the U-Net."""
    network, path = trained_lora
    family = SdxlFamily(sdxl_options(""))
    targets = family.targets.lora(models)
    names = {target.key: f"lora_unet_{target.modules[0].replace('.', '_')}" for target in unet_targets(models.denoiser)}
    renamed = {}
    for key, tensor in network.file_state().items():
        layer, _, rest = key.partition(".")
        renamed[f"{names.get(layer, layer)}.{rest}"] = tensor.detach().contiguous()
    assert "lora_unet_down_blocks_1_attentions_0_proj_in.alpha" in renamed
    save_file(renamed, tmp_path / "odd.safetensors")
    rows = partial(rows_of, models)
    entries = files.read(tmp_path / "odd.safetensors").matching(targets, rows)
    expected = files.read(path).matching(targets, rows)
    assert list(entries) == list(expected)
    assert all(torch.equal(entries[key][UP], entry[UP]) for key, entry in expected.items())


# ---- options and metadata


def options(*flags: str):
    base = ("--pretrained_model_name_or_path=m", "--network_module=networks.lora", "--output_dir=o")
    return parse_options(groups_for("sdxl", "network"), [*base, "--train_data_dir=d", "--resolution=64", *flags])


def test_flags_without_effect_are_reported():
    told = list(warnings(options("--v2", "--clip_skip=2"), TRAITS))
    assert [line for line in told if line.startswith("--v2: has no effect on SDXL")]
    assert [line for line in told if line.startswith("--clip_skip: has no effect on SDXL")]


@pytest.mark.rows("R275")
def test_v_prediction_needs_no_excuse():
    opts = options("--v_parameterization", "--zero_terminal_snr")
    assert not [line for line in warnings(opts, TRAITS) if "v_parameterization" in line or "terminal" in line]
    family = SdxlFamily(opts)
    assert family.denoiser.prediction_type() == "v_prediction"
    draw = family.denoiser.objective().draw(
        torch.randn(2, 4, 8, 8), torch.Generator().manual_seed(0), torch.tensor([999, 10])
    )
    assert_close(draw.noisy[0], draw.noise[0], atol=1e-6, rtol=0)  # nothing of the image is left


@pytest.mark.parametrize("flag", ["--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk"])
def test_cached_text_cannot_be_trained(flag):
    (problem,) = [p for p in problems(options(flag), TRAITS) if "cache_text" in p]
    assert "--network_train_unet_only" in problem
    assert not [p for p in problems(options(flag, "--network_train_unet_only"), TRAITS) if "cache_text" in p]


def test_metadata(models):
    for flags, predicted in (((), "epsilon"), (("--v_parameterization",), "v")):
        metadata = SdxlFamily(options(*flags)).writer.metadata(models)
        assert metadata == {
            "ss_v2": False,
            "ss_base_model_version": "sdxl_base_v1-0",
            "modelspec.architecture": "stable-diffusion-xl-v1-base",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "modelspec.prediction_type": predicted,
            "modelspec.resolution": "1024x1024",
        }


def test_text_names_do_not_depend_on_the_text_model_level(models):
    """Older transformers have the level in the first encoder's module tree too; the file's names are the same."""
    text = models.text_encoders["te1"]
    older = torch.nn.Module()
    older.text_model = text
    assert [t.key for t in clip_targets(older, "te1")] == [t.key for t in clip_targets(text, "te1")]
