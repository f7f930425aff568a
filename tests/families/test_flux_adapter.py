"""FLUX.1 in numbers, against diffusers' own pipeline."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch.testing import assert_close

from library.errors import UserError
from library.families.flux.adapter import FluxFamily
from library.families.flux.options import TRAITS, FluxOptions, resolution_shift
from library.families.flux.prediction import image_ids, pack_latents, unpack_latents
from library.runtime.logs import LOGGER
from library.types import TextCond
from tests.builders.flux import SCALING_FACTOR, SHIFT_FACTOR, T5, flux_options, tiny_ae, write_flux, write_parts

CAPTIONS = ["a red house", "a blue tree of a cat"]
LENGTH = 12


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def loaded(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {v: FluxFamily(flux_options(write_flux(folder, v), **parts)).loader.load() for v in ("dev", "schnell")}


def family(**options):
    return FluxFamily(flux_options("", t5xxl_max_token_length=LENGTH, **options))


def pipeline(models):
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=models.vae,
        text_encoder=models.text_encoders["te1"],
        tokenizer=models.tokenizers["te1"],
        text_encoder_2=models.text_encoders["te3"],
        tokenizer_2=models.tokenizers["te3"],
        transformer=models.denoiser,
    )


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- text -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_text_equals_diffusers(loaded):
    models = loaded["dev"]
    states, pooled, ids = pipeline(models).encode_prompt(CAPTIONS, None, max_sequence_length=LENGTH)
    cond = family().text.encode(models, CAPTIONS)
    assert_close(cond.tensors["t5_out"], states, atol=1e-5, rtol=0)
    assert_close(cond.tensors["l_pooled"], pooled, atol=1e-5, rtol=0)
    assert cond.tensors["txt_ids"].shape == (2, LENGTH, 3)
    assert cond.tensors["txt_ids"][0].equal(ids)
    assert cond.tensors["t5_attn_mask"].sum(1).tolist() == [4, 7]  # words and EOS


@pytest.mark.rows("R378")
@torch.no_grad()
def test_the_mask_acts_inside_t5(loaded):
    models = loaded["dev"]
    ids = models.tokenizers["te3"](CAPTIONS, padding="max_length", max_length=LENGTH, return_tensors="pt")
    masked = models.text_encoders["te3"](ids.input_ids, attention_mask=ids.attention_mask).last_hidden_state
    cond = family(apply_t5_attn_mask=True).text.encode(models, CAPTIONS)
    assert_close(cond.tensors["t5_out"], masked, atol=1e-5, rtol=0)
    plain = family().text.encode(models, CAPTIONS)
    assert (plain.tensors["t5_out"] - masked)[:, :3].abs().max() > 1e-3


@pytest.mark.rows("R407")
@torch.no_grad()
def test_captions_have_the_variants_own_length(loaded):
    for variant, length in (("dev", 512), ("schnell", 256)):
        cond = FluxFamily(flux_options("")).text.encode(loaded[variant], ["a cat"])
        assert cond.tensors["t5_out"].shape == (1, length, T5)


def test_missing_encoders_are_named(loaded):
    models = SimpleNamespace(**{**vars(loaded["dev"]), "text_encoders": {}})
    with pytest.raises(UserError, match="--clip_l: needed") as caught:
        family().text.encode(models, CAPTIONS)
    assert "--t5xxl: needed" in str(caught.value)


def test_cache_files(parts, tmp_path):
    """Names of formats 3.2; the lengths are known as soon as the model is."""
    adapter = FluxFamily(flux_options(write_flux(tmp_path, "schnell"), **parts, apply_t5_attn_mask=True))
    assert dict(adapter.text.layout().shapes) == {}
    models = adapter.loader.load()
    layout = adapter.text.layout(models)
    assert layout.suffix == "_flux_te.npz"
    assert dict(layout.flags) == {"apply_t5_attn_mask": True}
    assert dict(layout.shapes) == {"txt_ids": (256, 3), "t5_attn_mask": (256,)}
    with torch.no_grad():
        cond = adapter.text.encode(models, ["a cat"])
    assert set(cond.tensors) == set(layout.keys) == {"l_pooled", "t5_out", "txt_ids", "t5_attn_mask"}
    assert all(tuple(cond.tensors[name].shape[1:]) == shape for name, shape in layout.shapes.items())


# --- prediction -------------------------------------------------------------------------------------------------------


def test_packing_equals_diffusers():
    latents = noise(2, 16, 6, 8)
    tokens = FluxPipeline._pack_latents(latents, 2, 16, 6, 8)
    assert pack_latents(latents).equal(tokens)
    assert unpack_latents(tokens, 6, 8).equal(FluxPipeline._unpack_latents(tokens, 48, 64, 8))
    assert image_ids(6, 8, "cpu").equal(FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32))


@pytest.mark.parametrize("variant", ["dev", "schnell"])
@torch.no_grad()
def test_prediction_equals_a_step_of_diffusers_pipeline(loaded, variant):
    """One Euler step of its sampler is x - sigma * prediction."""
    models, sigma, latents = loaded[variant], 0.7, noise(2, 16, 6, 8)
    pipe = pipeline(models)
    pipe.set_progress_bar_config(disable=True)
    after = pipe(
        CAPTIONS,
        height=48,
        width=64,
        sigmas=[sigma],
        num_inference_steps=1,
        guidance_scale=2.5,
        latents=FluxPipeline._pack_latents(latents, 2, 16, 6, 8),
        max_sequence_length=LENGTH,
        output_type="latent",
    ).images
    expected = (latents - FluxPipeline._unpack_latents(after, 48, 64, 8)) / sigma
    adapter = family(guidance_scale=2.5)
    cond = adapter.text.encode(models, CAPTIONS)
    actual = adapter.denoiser.predict(models, latents, torch.full((2,), 1000 * sigma), cond)
    assert_close(actual, expected, atol=1e-4, rtol=0)
    assert expected.abs().mean() > 0.1


@torch.no_grad()
def test_residuals_are_added_behind_the_blocks_with_two_streams(loaded):
    models, latents, adapter = loaded["dev"], noise(2, 16, 4, 4), family()
    blocks = models.denoiser.transformer_blocks
    cond, times = adapter.text.encode(models, CAPTIONS), torch.tensor([100.0, 900.0])
    width = models.denoiser.config.num_attention_heads * models.denoiser.config.attention_head_dim
    residuals = tuple(0.1 * noise(2, 4, width) + number for number in range(len(blocks)))
    actual = adapter.denoiser.predict(models, latents, times, cond, None, residuals)

    def add(residual):
        return lambda _block, _inputs, output: (output[0], output[1] + residual)

    hooks = [block.register_forward_hook(add(one)) for block, one in zip(blocks, residuals, strict=True)]
    try:
        expected = adapter.denoiser.predict(models, latents, times, cond)
    finally:
        for hook in hooks:
            hook.remove()
    assert_close(actual, expected, atol=0, rtol=0)
    assert (actual - adapter.denoiser.predict(models, latents, times, cond)).abs().max() > 1e-3


@torch.no_grad()
def test_every_image_has_its_own_time(loaded):
    models, latents, adapter = loaded["dev"], noise(2, 16, 4, 4), family()
    cond = adapter.text.encode(models, CAPTIONS)
    both = adapter.denoiser.predict(models, latents, torch.tensor([100.0, 900.0]), cond)
    for row, time in enumerate((100.0, 900.0)):
        alone = TextCond({name: tensor[row : row + 1] for name, tensor in cond.tensors.items()})
        one = adapter.denoiser.predict(models, latents[row : row + 1], torch.tensor([time]), alone)
        assert_close(both[row : row + 1], one, atol=1e-5, rtol=0)


@torch.no_grad()
def test_guidance_of_the_batch_replaces_the_option(loaded):
    latents, times = noise(1, 16, 4, 4), torch.tensor([500.0])
    cond = family().text.encode(loaded["dev"], CAPTIONS[:1])

    def predict(variant, scale, asked=None):
        batch = SimpleNamespace(guidance=asked)
        return family(guidance_scale=scale).denoiser.predict(loaded[variant], latents, times, cond, batch)

    assert predict("dev", 3.5).equal(predict("dev", 1.0, 3.5))
    assert predict("dev", 0.0).equal(predict("dev", 3.5, 0.0))
    assert (predict("dev", 3.5) - predict("dev", 1.0)).abs().max() > 1e-3
    assert predict("schnell", 3.5).equal(predict("schnell", 1.0, 9.0))


@pytest.mark.rows("R378")
@torch.no_grad()
def test_masked_padding_does_not_matter(loaded):
    models, latents, times = loaded["dev"], noise(2, 16, 4, 4), torch.tensor([300.0, 600.0])
    masking, plain = family(apply_t5_attn_mask=True), family()
    cond = masking.text.encode(models, CAPTIONS)
    padding = cond.tensors["t5_attn_mask"][:, :, None] == 0
    other = TextCond({**cond.tensors, "t5_out": torch.where(padding, 5.0, cond.tensors["t5_out"])})
    same = masking.denoiser.predict(models, latents, times, cond)
    assert_close(masking.denoiser.predict(models, latents, times, other), same, atol=1e-5, rtol=0)
    assert (
        plain.denoiser.predict(models, latents, times, other) - plain.denoiser.predict(models, latents, times, cond)
    ).abs().max() > 0.01
    # Words and images are all seen: what is left out are the padding's tokens, nothing else.
    short = TextCond({name: t[:1] if name == "l_pooled" else t[:1, :4] for name, t in cond.tensors.items()})
    alone = plain.denoiser.predict(models, latents[:1], times[:1], short)
    assert_close(same[:1], alone, atol=1e-5, rtol=0)
    seen = TextCond({**cond.tensors, "t5_attn_mask": torch.ones_like(cond.tensors["t5_attn_mask"])})
    assert_close(
        masking.denoiser.predict(models, latents, times, seen),
        plain.denoiser.predict(models, latents, times, cond),
        atol=1e-5,
        rtol=0,
    )


@torch.no_grad()
def test_times_stay_exact_in_bfloat16(loaded):
    models, adapter, seen = loaded["dev"], family(), []
    handle = models.denoiser.time_text_embed.register_forward_hook(lambda _m, args, _o: seen.append(args))
    cond = adapter.text.encode(models, CAPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        adapter.denoiser.predict(models, noise(2, 16, 4, 4), torch.tensor([503.7, 998.3]), cond)
    others = torch.tensor([1.0]), torch.tensor([2.0]), seen[0][2][:1].float()
    models.denoiser.time_text_embed(*others)  # outside of a prediction its inputs are its own
    handle.remove()
    (times, guidance, _), later = seen
    assert_close(times, torch.tensor([503.7, 998.3]), atol=0, rtol=0)
    assert guidance.tolist() == [3500.0, 3500.0]
    assert all(one is other for one, other in zip(later, others, strict=True))


def test_gradients_pass_through_recomputed_masked_blocks(loaded):
    models, adapter = loaded["dev"], family(apply_t5_attn_mask=True)
    with torch.no_grad():
        cond = adapter.text.encode(models, CAPTIONS)
    gradients = []
    for recompute in (False, True):
        latents = noise(2, 16, 4, 4).requires_grad_()
        models.denoiser.train(recompute)
        if recompute:
            models.denoiser.enable_gradient_checkpointing()
        adapter.denoiser.predict(models, latents, torch.tensor([300.0, 600.0]), cond).square().sum().backward()
        gradients.append(latents.grad)
    models.denoiser.disable_gradient_checkpointing()
    models.denoiser.eval()
    assert gradients[0].abs().max() > 0
    assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_blocks_are_in_the_order_in_which_they_run(loaded):
    models, order = loaded["dev"], []
    blocks = family().denoiser.blocks(models)
    handles = [b.register_forward_hook(lambda _m, _a, _o, n=n: order.append(n)) for n, b in enumerate(blocks)]
    with torch.no_grad():
        cond = family().text.encode(models, CAPTIONS[:1])
        family().denoiser.predict(models, noise(1, 16, 4, 4), torch.tensor([1.0]), cond)
    for handle in handles:
        handle.remove()
    assert order == [0, 1, 2, 3]


# --- images ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_latents_equal_diffusers(loaded):
    """Caches hold them shifted and scaled."""
    models, adapter, pixels = loaded["dev"], family(), noise(2, 3, 32, 48).clamp(-1, 1)
    vae = tiny_ae()
    raw = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(5))
    latents = adapter.latents.encode(models, pixels, torch.Generator().manual_seed(5))
    assert_close(latents, (raw - SHIFT_FACTOR) * SCALING_FACTOR, atol=1e-5, rtol=0)
    assert adapter.latents.scale(latents) is latents
    assert_close(adapter.latents.decode(models, latents), vae.decode(raw).sample, atol=1e-4, rtol=0)
    assert models.vae.config.scaling_factor == SCALING_FACTOR
    assert models.vae.config.shift_factor == SHIFT_FACTOR


# --- objective and facts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "mu"), [(32, 0.5), (64, 0.63), (128, 1.15)])
def test_shift_by_resolution(side, mu):
    """The check values of formats 7.5."""
    shift = TRAITS.flow_shift(side, side)
    assert math.log(shift) == pytest.approx(mu, abs=1e-3)
    assert shift * 0.5 / (1 + (shift - 1) * 0.5) == pytest.approx(
        {0.5: 0.62246, 0.63: 0.65249, 1.15: 0.75951}[mu], abs=1e-4
    )


def test_the_objective_follows_the_options():
    options = {
        "timestep_sampling": "flux_shift",
        "discrete_flow_shift": 2.0,
        "sigmoid_scale": 1.5,
        "model_prediction_type": "raw",
        "weighting_scheme": "cosmap",
        "logit_mean": 0.1,
        "logit_std": 1.1,
        "mode_scale": 1.2,
    }
    settings = family(**options).denoiser.objective().settings
    assert settings.sampling == "flux_shift"
    assert settings.shift_of is resolution_shift
    assert (settings.shift, settings.sigmoid_scale, settings.prediction) == (2.0, 1.5, "raw")
    assert (settings.weighting_scheme, settings.logit_mean, settings.logit_std) == ("cosmap", 0.1, 1.1)
    assert (settings.mode_scale, settings.target) == (1.2, "velocity")
    usual = family().denoiser.objective().settings
    assert (usual.sampling, usual.shift, usual.prediction) == ("sigma", 3.0, "sigma_scaled")


@pytest.mark.parametrize("variant", ["dev", "schnell"])
def test_what_files_name(loaded, variant):
    facts = family(guidance_scale=1.0).writer.metadata(loaded[variant])
    assert facts["ss_base_model_version"] == "flux1"
    assert facts["modelspec.architecture"] == f"flux-1-{variant}"
    assert facts["modelspec.implementation"] == "https://github.com/black-forest-labs/flux"
    assert facts["modelspec.resolution"] == "1024x1024"
    assert "modelspec.prediction_type" not in facts
    assert (facts["ss_guidance_scale"], facts["ss_timestep_sampling"], facts["ss_model_type"]) == (1.0, "sigma", "flux")


def advice(**values):
    from library.options.base import Given, build_options
    from library.options.validation import problems, warnings
    from library.registry import groups_for

    opts = build_options(groups_for("flux", "network"), {name: Given(value, "x") for name, value in values.items()})
    return "\n".join(problems(opts, TRAITS)), "\n".join(warnings(opts, TRAITS))


def test_what_cannot_be_done_is_refused_or_said():
    assert "--model_type: chroma is not supported" in advice(model_type="chroma")[0]
    assert "--controlnet_model_name_or_path: not supported" in advice(controlnet_model_name_or_path="x")[0]
    assert "--split_mode: deprecated; use --blocks_to_swap 18" in advice(split_mode=True)[1]
    assert "--vae: has no effect on FLUX.1; give its autoencoder with --ae" in advice(vae="x")[1]
    assert "--model_prediction_type: sigma_scaled (the default" in advice()[1]
    assert "--model_prediction_type: additive does not fit" in advice(model_prediction_type="additive")[1]
    assert "--model_prediction_type" not in advice(model_prediction_type="raw")[1]


@pytest.mark.rows("R356", "R357")
def test_options_of_time_that_do_nothing_are_said():
    """Every option that the others keep from acting, and no other one."""
    raw = {"model_prediction_type": "raw"}
    time = {"discrete_flow_shift": 2.0, "sigmoid_scale": 2.0}
    idle = {
        "sigma": ["sigmoid_scale"],
        "uniform": ["discrete_flow_shift", "sigmoid_scale"],
        "sigmoid": ["discrete_flow_shift"],
        "shift": [],
        "flux_shift": ["discrete_flow_shift"],
    }
    assert idle.keys() == set(get_args(get_type_hints(FluxOptions)["timestep_sampling"]))
    for sampling, names in idle.items():
        said = advice(timestep_sampling=sampling, **raw, **time)[1].splitlines()
        assert sorted(line.partition(" without ")[0] for line in said) == [f"--{name}: has no effect" for name in names]
    densities, weights = ("logit_normal", "mode"), ("sigma_sqrt", "cosmap")
    for scheme in (*densities, *weights, "none", "uniform"):
        for sampling, reading in (("sigma", "raw"), ("shift", "raw"), ("shift", "sigma_scaled")):
            chosen = {"timestep_sampling": sampling, "model_prediction_type": reading, "weighting_scheme": scheme}
            acts = (sampling == "sigma" or scheme not in densities) and (reading != "raw" or scheme not in weights)
            assert ("--weighting_scheme: has no effect" in advice(**chosen)[1]) != acts, chosen
    chosen = {"timestep_sampling": "sigma", "logit_mean": 1.0, "logit_std": 2.0, "mode_scale": 1.0, **raw}
    assert advice(**chosen, weighting_scheme="logit_normal")[1].startswith("--mode_scale: has no effect without")
    assert len(advice(**chosen, weighting_scheme="mode")[1].splitlines()) == 2


@pytest.mark.parametrize(("variant", "scale", "warned"), [("schnell", 1.0, 1), ("schnell", 3.5, 0), ("dev", 1.0, 0)])
def test_schnell_gets_no_guidance(tmp_path, parts, caplog, monkeypatch, variant, scale, warned):
    monkeypatch.setattr(LOGGER, "propagate", True)
    FluxFamily(flux_options(write_flux(tmp_path, variant), **parts, guidance_scale=scale)).loader.load()
    assert caplog.text.count("--guidance_scale: has no effect on schnell") == warned
