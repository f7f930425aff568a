"""The SD3 family's own answers: text, prediction, latents, targets, metadata.

References: diffusers' StableDiffusion3Pipeline with parts that were not read by our code, and formats §1.6, §2, §3, §7.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from library.families.sd3.adapter import Sd3Family
from library.families.sd3.targets import mmdit_targets
from library.families.sd3.text import drop_encoders, published_clip_l
from library.text.tokenizers import CLIP_VOCABULARY
from library.types import Models, TextCond
from networks import files
from tests.builders.sd3 import (
    CLIP_L,
    DEPTH,
    DUAL,
    POOLED,
    T5,
    TABLE,
    VARIANTS,
    WIDTH,
    mmdit_tensors,
    sd3_options,
    sd3_tensors,
    tiny_clip,
    tiny_vae,
    write_tiny_sd3,
)
from tests.builders.t5 import tiny_t5, tiny_t5_backend, write_t5_tokenizer
from tests.networks.builders import lora_sd3

ALL = ("te1", "te2", "te3")
PROMPTS = ["a red house of a cat", "blue"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """--tokenizer_cache_dir with a small tokenizer for T5."""
    folder = tmp_path_factory.mktemp("tokenizers")
    write_t5_tokenizer(folder / "google_t5-v1_1-xxl")
    return str(folder)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def single_file(variant, tmp_path_factory):
    return write_tiny_sd3(tmp_path_factory.mktemp("single") / "sd3.safetensors", variant, encoders=ALL)


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    return write_tiny_sd3(tmp_path_factory.mktemp("medium") / "sd3.safetensors", encoders=ALL)


@pytest.fixture(scope="module")
def loaded(medium, cache) -> tuple[Sd3Family, Models]:
    family = Sd3Family(sd3_options(medium, cache=cache))
    return family, family.loader.load()


def their_denoiser(tensors: dict[str, torch.Tensor], variant: str) -> SD3Transformer2DModel:
    """diffusers' model around what its own converter makes of a file."""
    model = SD3Transformer2DModel(
        sample_size=16,
        num_layers=DEPTH,
        num_attention_heads=1,
        joint_attention_dim=T5,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=TABLE,
        dual_attention_layers=tuple(range(DUAL)) if variant == "5-medium" else (),
        qk_norm=None if variant == "medium" else "rms_norm",
    )
    model.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(dict(tensors)))
    return model.eval()


def their_pipeline(variant: str = "medium", t5: bool = True) -> StableDiffusion3Pipeline:
    tokenizer_3 = PreTrainedTokenizerFast(
        tokenizer_object=tiny_t5_backend(), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    return StableDiffusion3Pipeline(
        transformer=their_denoiser(mmdit_tensors(variant), variant),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=tiny_clip("te1"),
        tokenizer=CLIPTokenizer.from_pretrained(CLIP_VOCABULARY, model_max_length=77),
        text_encoder_2=tiny_clip("te2"),
        tokenizer_2=CLIPTokenizer.from_pretrained(CLIP_VOCABULARY, model_max_length=77, pad_token="!"),
        text_encoder_3=tiny_t5(T5) if t5 else None,
        tokenizer_3=tokenizer_3 if t5 else None,
    )


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(seed))


def fed(family: Sd3Family, models: Models, cond: TextCond, **options) -> dict[str, torch.Tensor]:
    """What predict() gives to the denoiser."""
    seen = {}
    handle = models.denoiser.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    try:
        family.denoiser.predict(models, latents(), torch.tensor([1, 2]), cond)
    finally:
        handle.remove()
    return seen


# --- text -------------------------------------------------------------------------------------------------------------


def test_text_is_what_the_pipeline_of_diffusers_gives(loaded):
    family, models = loaded
    ours = fed(family, models, family.text.encode(models, PROMPTS))
    with torch.no_grad():
        prompt, _, pooled, _ = their_pipeline().encode_prompt(
            PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False, max_sequence_length=256
        )
    assert prompt.shape == (2, 77 + 256, T5)
    assert_close(ours["encoder_hidden_states"], prompt, **CLOSE)
    assert_close(ours["pooled_projections"], pooled, **CLOSE)


def test_without_t5_77_rows_of_zeros_stand_for_it(tmp_path):
    family = Sd3Family(sd3_options(write_tiny_sd3(tmp_path / "sd3.safetensors", encoders=("te1", "te2"))))
    models = family.loader.load()
    assert list(models.tokenizers) == ["te1", "te2"]
    cond = family.text.encode(models, PROMPTS)
    with torch.no_grad():
        prompt, *_ = their_pipeline(t5=False).encode_prompt(
            PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False, max_sequence_length=77
        )
    assert_close(fed(family, models, cond)["encoder_hidden_states"], prompt, **CLOSE)
    assert not cond.tensors["t5_out"].any()
    assert cond.tensors["t5_attn_mask"].shape == (2, 77)


@pytest.mark.rows("R448")
def test_masks_hide_padding_inside_the_encoders(medium, cache):
    family = Sd3Family(
        sd3_options(medium, cache=cache, apply_lg_attn_mask=True, apply_t5_attn_mask=True, t5xxl_max_token_length=20)
    )
    models = family.loader.load()
    cond = family.text.encode(models, PROMPTS).tensors
    pipeline = their_pipeline()
    states, pooled = [], []
    for part, tokenizer, mask in (
        ("te1", pipeline.tokenizer, "clip_l_attn_mask"),
        ("te2", pipeline.tokenizer_2, "clip_g_attn_mask"),
    ):
        tokens = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt")
        assert torch.equal(cond[mask], tokens.attention_mask)
        with torch.no_grad():
            found = tiny_clip(part)(**tokens, output_hidden_states=True)
        states.append(found.hidden_states[-2])
        pooled.append(found.text_embeds)
    assert_close(cond["lg_out"], torch.cat(states, -1), **CLOSE)
    assert_close(cond["lg_pooled"], torch.cat(pooled, -1), **CLOSE)
    tokens = pipeline.tokenizer_3(PROMPTS, padding="max_length", max_length=20, return_tensors="pt")
    assert torch.equal(cond["t5_attn_mask"], tokens.attention_mask)
    with torch.no_grad():
        t5 = tiny_t5(T5)(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    assert_close(cond["t5_out"], t5, **CLOSE)
    plain = Sd3Family(sd3_options(medium, cache=cache, t5xxl_max_token_length=20)).text.encode(models, PROMPTS).tensors
    assert (plain["lg_out"] - cond["lg_out"]).abs().max() > 0.01
    assert (plain["t5_out"] - cond["t5_out"]).abs().max() > 0.01


def test_cache_files_hold_what_the_conditioning_has(loaded):
    family, models = loaded
    layout = family.text.layout()
    tensors = family.text.encode(models, PROMPTS).tensors
    assert layout.suffix == "_sd3_te.npz"
    assert set(layout.keys) == set(tensors)
    assert layout.flags == {"apply_lg_attn_mask": False, "apply_t5_attn_mask": False}
    assert all(tensors[name].shape[1:] == shape for name, shape in layout.shapes.items())


def test_cached_outputs_need_no_encoders(loaded):
    family, models = loaded
    cond = family.text.encode(models, PROMPTS)
    bare = Models(models.denoiser, {}, {}, None, models.source)
    halved = cond.map(lambda tensor: tensor.half() if tensor.is_floating_point() else tensor)
    with torch.no_grad():
        direct = family.denoiser.predict(models, latents(), torch.tensor([100, 900]), cond)
        from_cache = family.denoiser.predict(bare, latents(), torch.tensor([100, 900]), halved)
    assert_close(from_cache, direct, rtol=1e-2, atol=1e-2)


def test_gradients_reach_the_text_encoders(loaded):
    family, models = loaded
    weight = models.text_encoders["te1"].text_model.encoder.layers[0].mlp.fc1.weight.requires_grad_(True)
    try:
        cond = family.text.encode(models, PROMPTS)
        family.denoiser.predict(models, latents(), torch.tensor([1, 2]), cond).mean().backward()
        assert weight.grad.abs().max() > 0
    finally:
        weight.grad = None
        weight.requires_grad_(False)


# --- dropping encoders ------------------------------------------------------------------------------------------------


def dropped(
    models: Models, cond: TextCond, seed: int = 0, train: bool = True, **rates: float
) -> dict[str, torch.Tensor]:
    family = Sd3Family(sd3_options("", **rates))
    models.denoiser.train(train)
    try:
        torch.manual_seed(0)
        return fed(family, models, cond)
    finally:
        models.denoiser.eval()


@pytest.mark.rows("R436")
@pytest.mark.parametrize(
    ("rate", "states", "pooled"),
    [
        ("clip_l_dropout_rate", (slice(0, 77), slice(0, CLIP_L)), slice(0, CLIP_L)),
        ("clip_g_dropout_rate", (slice(0, 77), slice(CLIP_L, 2 * CLIP_L)), slice(CLIP_L, POOLED)),
        ("t5_dropout_rate", (slice(77, None), slice(0, T5)), slice(0, 0)),
    ],
)
def test_dropout_zeros_one_encoder_in_training_only(loaded, rate, states, pooled):
    family, models = loaded
    cond = family.text.encode(models, PROMPTS)
    freed = Models(models.denoiser, {}, {}, None, models.source)  # as after caching
    whole, found = fed(family, models, cond), dropped(freed, cond, **{rate: 1.0})
    expected = whole["encoder_hidden_states"].clone()
    expected[:, states[0], states[1]] = 0
    assert torch.equal(found["encoder_hidden_states"], expected)
    expected = whole["pooled_projections"].clone()
    expected[:, pooled] = 0
    assert torch.equal(found["pooled_projections"], expected)
    with torch.no_grad():  # validation runs in train mode, too
        assert torch.equal(
            dropped(models, cond, **{rate: 1.0})["encoder_hidden_states"], whole["encoder_hidden_states"]
        )
    kept = dropped(models, cond, train=False, **{rate: 1.0})
    assert torch.equal(kept["encoder_hidden_states"], whole["encoder_hidden_states"])


def test_without_clip_l_its_share_is_that_of_the_published_models():
    shapes = {"lg_out": (1, 77, 2048), "lg_pooled": (1, 2048)}
    assert published_clip_l(TextCond({name: torch.ones(shape) for name, shape in shapes.items()})) == (768, 768)


def test_dropout_is_drawn_per_caption_from_the_seeded_stream(loaded):
    family, models = loaded
    one = family.text.encode(models, ["a red house"])
    cond = TextCond.cat([one] * 400)
    rates = (0.25, 0.5, 0.75)
    torch.manual_seed(5)
    first = drop_encoders(cond, rates, (CLIP_L, CLIP_L)).tensors
    torch.manual_seed(5)
    again = drop_encoders(cond, rates, (CLIP_L, CLIP_L)).tensors
    assert all(torch.equal(first[name], again[name]) for name in first)
    gone = [
        ~first["lg_out"][:, 0, :CLIP_L].any(1),
        ~first["lg_out"][:, 0, CLIP_L:].any(1),
        ~first["t5_out"][:, 0].any(1),
    ]
    for lost, rate in zip(gone, rates, strict=True):
        assert abs(lost.float().mean().item() - rate) < 0.1
    assert not torch.equal(gone[0], gone[1])


# --- prediction and latents -------------------------------------------------------------------------------------------


def test_prediction_is_that_of_diffusers(variant, single_file, cache):
    family = Sd3Family(sd3_options(single_file, cache=cache))
    models = family.loader.load()
    pipeline = their_pipeline(variant)
    noisy, timesteps = latents(), torch.tensor([17, 980])
    with torch.no_grad():
        prompt, _, pooled, _ = pipeline.encode_prompt(PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False)
        (theirs,) = pipeline.transformer(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            return_dict=False,
        )
        ours = family.denoiser.predict(models, noisy, timesteps, family.text.encode(models, PROMPTS))
    assert theirs.std() > 0.01
    assert_close(ours, theirs, **CLOSE)


@torch.no_grad()
def test_residuals_are_added_behind_the_blocks_but_the_last(loaded):
    family, models = loaded
    cond, times, denoiser = family.text.encode(models, PROMPTS), torch.tensor([17, 980]), models.denoiser
    blocks, noisy = denoiser.transformer_blocks, latents()
    tokens, width = noisy.shape[-1] * noisy.shape[-2] // 4, denoiser.config.num_attention_heads * 64
    generator = torch.Generator().manual_seed(5)
    residuals = tuple(torch.randn(2, tokens, width, generator=generator) for _ in blocks)
    actual = family.denoiser.predict(models, noisy, times, cond, None, residuals)

    def add(residual):
        return lambda _block, _inputs, output: (output[0], output[1] + residual)

    hooks = [block.register_forward_hook(add(one)) for block, one in zip(blocks[:-1], residuals, strict=False)]
    try:
        expected = family.denoiser.predict(models, noisy, times, cond)
    finally:
        for hook in hooks:
            hook.remove()
    assert_close(actual, expected, atol=0, rtol=0)
    assert (actual - family.denoiser.predict(models, noisy, times, cond)).abs().max() > 1e-3


def test_latents_are_raw_in_caches_and_scaled_for_the_denoiser(loaded):
    family, models = loaded
    pixels = torch.rand(2, 3, 64, 96) * 2 - 1
    found = family.latents.encode(models, pixels, torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = tiny_vae().encode(pixels).latent_dist.sample(torch.Generator().manual_seed(3))
    assert_close(found, expected, **CLOSE)
    scaled = family.latents.scale(found)
    assert_close(scaled, (expected - 0.0609) * 1.5305, **CLOSE)
    with torch.no_grad():
        assert_close(family.latents.decode(models, scaled), tiny_vae().decode(expected).sample, **CLOSE)


def test_what_is_trained(loaded):
    family, _ = loaded
    objective = family.denoiser.objective()
    draw = objective.draw(torch.zeros(2, 16, 4, 4), torch.Generator().manual_seed(0), torch.tensor([250, 750]))
    sigma = torch.tensor([0.25, 0.75])[:, None, None, None]
    assert_close(draw.noisy, sigma * draw.noise)
    assert_close(draw.target, torch.zeros(2, 16, 4, 4))  # the clean image
    # A denoiser that knows the velocity noise - 0 has no loss.
    assert_close(objective.loss(draw.noise, draw, torch.ones(2)), torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.rows("R440", "R441")
def test_training_shift_moves_the_drawn_times():
    def mean(**options) -> float:
        objective = Sd3Family(sd3_options("", **options)).denoiser.objective()
        draw = objective.draw(torch.zeros(2000, 1, 1, 1), torch.Generator().manual_seed(0))
        assert not draw.timesteps.is_floating_point()
        return draw.timesteps.float().mean().item()

    assert abs(mean() - 500) < 25
    assert mean(training_shift=0.5) < 420
    assert mean(training_shift=3.0) > 650
    assert mean(weighting_scheme="logit_normal", logit_mean=1.0) > 620


def test_traits_and_metadata(variant, single_file, cache):
    family = Sd3Family(sd3_options(single_file, cache=cache, apply_lg_attn_mask=True))
    metadata = family.writer.metadata(family.loader.load())
    assert metadata["ss_base_model_version"] == variant
    assert metadata["ss_apply_lg_attn_mask"] is True
    assert metadata["ss_weighting_scheme"] == "uniform"
    assert metadata["modelspec.architecture"] == f"stable-diffusion-3-{variant}"
    assert metadata["modelspec.prediction_type"] == "flow"
    assert metadata["modelspec.resolution"] == "1024x1024"
    assert family.traits.flow_shift(128, 128) == 3.0
    assert family.traits.cache_suffix == "_sd3.npz"
    assert family.traits.cache_keys_by_size


# --- targets and LoRA -------------------------------------------------------------------------------------------------


def published_denoiser(depth: int, **config) -> SD3Transformer2DModel:
    with torch.device("meta"):
        return SD3Transformer2DModel(
            num_layers=depth,
            num_attention_heads=depth,
            caption_projection_dim=64 * depth,
            pooled_projection_dim=2048,
            pos_embed_max_size=16,
            **config,
        )


@pytest.mark.parametrize(
    ("depth", "config", "count"),
    [
        (24, {}, 237),
        (24, {"dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}, 263),
        (38, {"qk_norm": "rms_norm"}, 377),
    ],
)
def test_target_counts_of_the_published_models(depth, config, count):
    targets = mmdit_targets(published_denoiser(depth, **config))
    in_blocks = [target for target in targets if not target.optional]
    assert len(in_blocks) == count
    assert len({target.key for target in targets}) == len(targets)
    last = {target.key for target in in_blocks if f"joint_blocks_{depth - 1}_context" in target.key}
    start = f"lora_unet_joint_blocks_{depth - 1}_context_block_"
    assert last == {start + "attn_qkv", start + "adaLN_modulation_1"}
    assert {target.key for target in targets if target.swap_halves} == {
        start + "adaLN_modulation_1",
        "lora_unet_final_layer_adaLN_modulation_1",
    }
    assert [target.key for target in targets if target.optional] == [
        "lora_unet_context_embedder",
        "lora_unet_t_embedder_mlp_0",
        "lora_unet_t_embedder_mlp_2",
        "lora_unet_x_embedder_proj",
        "lora_unet_y_embedder_mlp_0",
        "lora_unet_y_embedder_mlp_2",
        "lora_unet_final_layer_adaLN_modulation_1",
        "lora_unet_final_layer_linear",
    ]


def test_targets_lead_to_layers_text_encoders_first(loaded):
    family, models = loaded
    targets = family.targets.lora(models)
    parts = [target.part for target in targets]
    assert parts == sorted(parts, key=["te1", "te2", "te3", "denoiser"].index)
    assert {parts.count(part) for part in ("te1", "te2")} == {3 * 6}
    assert {target.key for target in targets} > {
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_2_mlp_fc2",
        "lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_0",
    }
    assert all(target.optional for target in targets if target.part == "te3")
    for target in targets:
        root = models.denoiser if target.part == "denoiser" else models.text_encoders[target.part]
        assert all(hasattr(root.get_submodule(path), "weight") for path in target.modules)
    fused = next(target for target in targets if target.key.endswith("blocks_0_context_block_attn_qkv"))
    assert fused.modules == tuple(f"transformer_blocks.0.attn.add_{name}_proj" for name in "qkv")


def test_blocks_are_those_of_the_denoiser_in_order(loaded):
    family, models = loaded
    assert family.denoiser.blocks(models) == [models.denoiser.transformer_blocks[index] for index in range(DEPTH)]


def test_a_lora_acts_as_its_product_added_to_the_files_weights(variant, single_file, cache, tmp_path):
    """The sum is made in the file, by its own names, and read by diffusers."""
    family = Sd3Family(sd3_options(single_file, cache=cache))
    models = family.loader.load()
    targets = [target for target in family.targets.lora(models) if target.part == "denoiser"]
    network = lora_sd3.create(
        targets, models, dim=4, alpha=2.0, dropout=None, args={"emb_dims": "[2,3,4,5,6,7]"}, seed=1
    )
    rng = torch.Generator().manual_seed(2)
    for layer in network.layers().values():
        layer.lora_up.weight.data = 0.1 * torch.randn(layer.lora_up.weight.shape, generator=rng)
    save_file(
        {name: tensor.contiguous() for name, tensor in network.file_state().items()}, tmp_path / "lora.safetensors"
    )
    assert len(network.layers()) == len(targets)
    cond, noisy, timesteps = family.text.encode(models, PROMPTS), latents(), torch.tensor([17, 980])
    with torch.no_grad():
        before = family.denoiser.predict(models, noisy, timesteps, cond)
        network.attach(models)
        ours = family.denoiser.predict(models, noisy, timesteps, cond)

    tensors, merged = mmdit_tensors(variant), 0
    lora = load_file(tmp_path / "lora.safetensors")
    for name in [name for name in tensors if name.endswith(".weight")]:
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{key}.lora_up.weight" in lora:
            up, down = lora[f"{key}.lora_up.weight"], lora[f"{key}.lora_down.weight"]
            change = (up.flatten(1) @ down.flatten(1)) * lora[f"{key}.alpha"] / len(down)
            tensors[name] = tensors[name] + change.reshape(tensors[name].shape)
            merged += 1
    assert merged == len(targets)
    context, pooled = fed(family, models, cond)["encoder_hidden_states"], cond.tensors["lg_pooled"]
    with torch.no_grad():
        theirs = their_denoiser(tensors, variant)(noisy, context, pooled, timesteps).sample
    assert (ours - before).abs().max() > 0.05
    assert_close(ours, theirs, **CLOSE)
    assert set(files.read(tmp_path / "lora.safetensors").entries) == {target.key for target in targets}


def test_files_without_encoders_still_name_the_denoisers_layers(tmp_path):
    save_file(sd3_tensors(), tmp_path / "sd3.safetensors")
    family = Sd3Family(sd3_options(tmp_path / "sd3.safetensors"))
    assert {target.part for target in family.targets.lora(family.loader.load())} == {"denoiser"}
