"""ControlNets of FLUX.1 and Stable Diffusion 3: what diffusers computes with the same weights, and their files."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
)
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from library.errors import UserError
from library.families.flux.adapter import FluxFamily
from library.families.flux.prediction import image_ids, pack_latents
from library.families.sd3.adapter import Sd3Family
from library.families.shared.recognition import CONTROLNET, recognise_file
from tests.builders.flux import write_flux, write_parts
from tests.builders.options import options_for
from tests.builders.sd3 import VARIANTS, write_tiny_sd3
from tests.builders.t5 import write_t5_tokenizer
from tests.families.test_controlnet import batch_of, reaches_the_end, same

SIDE, SIGMA, T5_TOKENS = 64, 0.7, 12
CAPTIONS = ["a red house", "a blue tree of a cat"]
SAVED = {"save_as": "safetensors", "dtype": None, "metadata": {}}
FORMATS = ["safetensors", "ckpt", "diffusers", "diffusers_safetensors"]


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """By name, (family, models): FLUX.1 dev and schnell, and Stable Diffusion 3 and 3.5; VAEs draw their means."""
    folder = tmp_path_factory.mktemp("models")
    parts = write_parts(folder / "flux")
    write_t5_tokenizer(folder / "google_t5-v1_1-xxl")
    cases = {}
    for variant in ("dev", "schnell"):
        model = {"pretrained_model_name_or_path": str(write_flux(folder, variant)), **parts}
        cases[variant] = FluxFamily(options_for("flux", "control_net", **model, t5xxl_max_token_length=T5_TOKENS))
    for variant in VARIANTS:
        encoders = ("te1", "te2", "te3") if variant == VARIANTS[0] else ()
        file = write_tiny_sd3(folder / f"{variant}.safetensors", variant, encoders=encoders, depth=4)
        model = {"pretrained_model_name_or_path": str(file), "tokenizer_cache_dir": str(folder)}
        cases[variant] = Sd3Family(options_for("sd3", "control_net", **model, t5xxl_max_token_length=T5_TOKENS))
    loaded = {name: (family, family.loader.load()) for name, family in cases.items()}
    with_texts = loaded[VARIANTS[0]][1]
    for variant in VARIANTS[1:]:  # the same texts for all, which take longest to make
        loaded[variant][1].text_encoders = with_texts.text_encoders
        loaded[variant][1].tokenizers = with_texts.tokenizers
    return loaded


@pytest.fixture
def case(request, families):
    """(family, models, a ControlNet that is no longer as it was made)."""
    family, models = families[request.param]
    return family, models, shaken(family.control.build(models))


def shaken(net):
    generator = torch.Generator().manual_seed(1)
    for weight in net.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return net.requires_grad_(False).eval()


def config_of(net):
    """As JSON has it, where tuples are lists."""
    return {key: value for key, value in json.loads(net.to_json_string()).items() if not key.startswith("_")}


def noise(seed=2):
    return torch.randn(2, 16, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(seed))


def predicted(family, models, net, **changes):
    """Our prediction at SIGMA, with control images and without."""
    cond = family.text.encode(models, CAPTIONS)
    times, batch = torch.full((2,), 1000 * SIGMA), replace(batch_of(side=SIDE), **changes)
    found = family.control.predict(models, net, noise(), times, cond, batch)
    return found, family.control.predict(models, net, noise(), times, cond, replace(batch, control=None))


@torch.no_grad()
@pytest.mark.parametrize("case", ["dev", "schnell"], indirect=True)
def test_a_step_of_flux_is_that_of_diffusers_pipeline(case):
    """In float32. One Euler step of its sampler is x - sigma * prediction; what it computes is of order 1."""
    family, models, net = case
    pipe = FluxControlNetPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=models.vae,
        text_encoder=models.text_encoders["te1"],
        tokenizer=models.tokenizers["te1"],
        text_encoder_2=models.text_encoders["te3"],
        tokenizer_2=models.tokenizers["te3"],
        transformer=models.denoiser,
        controlnet=net,
    )
    pipe.set_progress_bar_config(disable=True)
    after = pipe(
        CAPTIONS,
        control_image=batch_of(side=SIDE).control.movedim(1, -1).numpy(),  # tensors would be taken as they are
        height=SIDE,
        width=SIDE,
        sigmas=[SIGMA],
        num_inference_steps=1,
        guidance_scale=3.5,
        latents=pack_latents(noise()),
        max_sequence_length=T5_TOKENS,
        output_type="latent",
    ).images
    expected = (noise() - FluxControlNetPipeline._unpack_latents(after, SIDE, SIDE, 8)) / SIGMA
    found, plain = predicted(family, models, net)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - plain).abs().max() > 1e-2 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("case", VARIANTS, indirect=True)
def test_a_step_of_sd3_is_that_of_diffusers_pipeline(case):
    """As for FLUX.1. The pipeline draws latents of the control image, so the VAE's variance is taken away."""
    family, models, net = case
    vae = models.vae
    last = vae.encoder.conv_out
    kept = last.weight.clone(), last.bias.clone()
    last.weight[16:], last.bias[16:] = 0, -30  # logarithm of the variance
    try:
        pipe = StableDiffusion3ControlNetPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=models.text_encoders["te1"],
            tokenizer=models.tokenizers["te1"],
            text_encoder_2=models.text_encoders["te2"],
            tokenizer_2=models.tokenizers["te2"],
            text_encoder_3=models.text_encoders["te3"],
            tokenizer_3=models.tokenizers["te3"],
            transformer=models.denoiser,
            controlnet=net,
        )
        pipe.set_progress_bar_config(disable=True)
        after = pipe(
            CAPTIONS,
            control_image=batch_of(side=SIDE).control.movedim(1, -1).numpy(),  # tensors would be taken as they are
            height=SIDE,
            width=SIDE,
            sigmas=[SIGMA],
            num_inference_steps=1,
            guidance_scale=1.0,
            latents=noise(),
            max_sequence_length=T5_TOKENS,
            output_type="latent",
        ).images
    finally:
        last.weight[:], last.bias[:] = kept
    expected = (noise() - after) / SIGMA
    found, plain = predicted(family, models, net)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - plain).abs().max() > 1e-2 * expected.abs().max()


@torch.no_grad()
def test_blocks_of_one_stream_have_their_residuals(families, tmp_path):
    """A ControlNet with both kinds of blocks, from a file; diffusers takes its outputs as they are."""
    family, models = families["dev"]
    shape = {**config_of(family.control.build(models)), "num_layers": 1, "num_single_layers": 1}
    made = shaken(FluxControlNetModel(**shape))
    family.control.save(made, tmp_path / "n.safetensors", save_as="safetensors", dtype=None, metadata={})
    net = family.control.load(models, str(tmp_path / "n.safetensors"))
    cond, batch = family.text.encode(models, CAPTIONS), batch_of(side=SIDE)
    common = {
        "hidden_states": pack_latents(noise()),
        "encoder_hidden_states": cond.tensors["t5_out"],
        "pooled_projections": cond.tensors["l_pooled"],
        "timestep": torch.full((2,), SIGMA),
        "img_ids": image_ids(SIDE // 8, SIDE // 8, "cpu"),
        "txt_ids": torch.zeros(T5_TOKENS, 3),
        "guidance": torch.full((2,), 3.5),
        "return_dict": False,
    }
    double, single = made(controlnet_cond=batch.control * 2 - 1, **common)
    (tokens,) = models.denoiser(
        controlnet_block_samples=double, controlnet_single_block_samples=single, controlnet_blocks_repeat=True, **common
    )
    expected = FluxControlNetPipeline._unpack_latents(tokens, SIDE, SIDE, 8)
    found, _ = predicted(family, models, net)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    without = family.control.residuals(models, net, noise(), torch.full((2,), 700.0), cond, batch)[:2]
    part = family.denoiser.predict(models, noise(), torch.full((2,), 700.0), cond, batch, without)
    assert (part - expected).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_mask_of_t5_reaches_the_controlnet(families, checkpointing):
    """With it, padding does not matter; the second run of checkpointed blocks sees it too."""
    family, models = families["dev"]
    masked = FluxFamily(family.opts.replaced(apply_t5_attn_mask=True))
    net = shaken(masked.control.build(models)).requires_grad_(True).train()
    if checkpointing:
        net.enable_gradient_checkpointing()
    cond = masked.text.encode(models, CAPTIONS)
    other = dict(cond.tensors)
    seen = other["t5_attn_mask"].bool()[..., None]
    other["t5_out"] = torch.where(seen, other["t5_out"], other["t5_out"] + 5.0)
    found, gradients = [], []
    for tensors in (cond.tensors, other):
        residuals = masked.control.residuals(
            models, net, noise(), torch.tensor([17.0, 803.0]), replace(cond, tensors=tensors), batch_of(side=SIDE)
        )
        sum(one.square().sum() for one in residuals).backward()
        found.append(torch.stack(residuals).detach())
        gradients.append(net.transformer_blocks[0].attn.to_q.weight.grad.clone())
        net.zero_grad()
    assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-3)
    assert gradients[0].abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", ["dev", "schnell", *VARIANTS])
def test_a_new_one_copies_the_denoiser_and_changes_nothing(families, name):
    family, models = families[name]
    net = family.control.build(models)
    base, own = models.denoiser.state_dict(), net.state_dict()
    added = {key.partition(".")[0] for key in own if key not in base}
    assert added == (
        {"controlnet_blocks", "pos_embed_input"}
        if name in VARIANTS
        else {"controlnet_blocks", "controlnet_x_embedder", "input_hint_block"}
    )
    assert all(torch.equal(own[key], base[key]) for key in own if key in base)
    found, plain = predicted(family, models, net)
    assert torch.equal(found, plain)
    assert len(net.transformer_blocks) == 2  # all that the tiny FLUX has; half of SD3's four
    if name not in VARIANTS:
        assert reaches_the_end(net.input_hint_block)


@pytest.mark.parametrize("save_as", FORMATS)
@pytest.mark.parametrize("case", ["dev", *VARIANTS], indirect=True)
def test_what_is_saved_is_read_again_to_the_bit(case, tmp_path, save_as):
    family, models, net = case
    path = tmp_path / ("net" if save_as.startswith("diffusers") else f"net.{save_as}")
    family.control.save(net, path, save_as=save_as, dtype=None, metadata={})
    again = family.control.load(models, str(path))
    assert same(again.state_dict(), net.state_dict())
    assert config_of(again) == config_of(net)
    if path.is_dir():
        model_class = FluxControlNetModel if isinstance(net, FluxControlNetModel) else SD3ControlNetModel
        assert same(model_class.from_pretrained(path).state_dict(), net.state_dict())
    else:
        assert recognise_file(path) in (None, CONTROLNET)


@pytest.mark.parametrize("case", ["dev"], indirect=True)
def test_flux_files_have_the_original_names(case, tmp_path):
    """Blocks as in the model's file, where their weights come from; what is added has names of its own."""
    family, models, net = case
    metadata = {"modelspec.architecture": "flux-1-dev/controlnet"}
    family.control.save(net, tmp_path / "n.safetensors", save_as="safetensors", dtype=torch.float16, metadata=metadata)
    tensors = load_file(tmp_path / "n.safetensors")
    base = load_file(models.source.name)
    added = {key for key in tensors if key not in base}
    assert added == {
        f"{name}.{part}"
        for part in ("weight", "bias")
        for name in (
            *("controlnet_blocks.0", "controlnet_blocks.1", "pos_embed_input"),
            *(f"input_hint_block.{number}" for number in range(0, 15, 2)),
        )
    }
    assert all(tensors[key].shape == base[key].shape for key in tensors.keys() - added)
    assert not any(key.startswith(("final_layer", "single_blocks")) for key in tensors)
    strides = [conv.stride[0] for conv in net.input_hint_block.blocks]
    assert [tuple(tensors[f"input_hint_block.{n}.weight"].shape) for n in (0, 2, 14)] == [
        (16, 3, 3, 3), (16, 16, 3, 3), (16, 16, 3, 3),
    ]  # fmt: skip
    assert strides == [1, 2, 1, 2, 1, 2]
    # What was copied from the model and has not been shaken would be the model's: names meet the right tensors.
    fresh = family.control.build(models)
    family.control.save(fresh, tmp_path / "f.safetensors", save_as="safetensors", dtype=None, metadata={})
    copied = load_file(tmp_path / "f.safetensors")
    assert all(torch.equal(copied[key], base[key]) for key in copied.keys() & base.keys())
    header = (tmp_path / "n.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert json.loads(header[8 : 8 + length])["__metadata__"] == metadata


@pytest.mark.parametrize("case", ["dev"], indirect=True)
def test_flux_files_with_the_names_of_diffusers_are_read(case, tmp_path):
    family, models, net = case
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, tmp_path / "n.safetensors")
    assert same(family.control.load(models, str(tmp_path / "n.safetensors")).state_dict(), net.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["without positions", "with the pooled text"])
def test_other_kinds_for_sd3_are_read(families, tmp_path, kind):
    """Published for 3.5 are ones that take the denoiser's own positions, and no texts but the pooled one."""
    family, models = families["5-large"]
    base = models.denoiser.config
    shape = {**config_of(family.control.build(models)), "force_zeros_for_pooled_projection": False}
    if kind == "without positions":
        shape |= {"use_pos_embed": False, "joint_attention_dim": None}
    made = shaken(SD3ControlNetModel(**shape))
    folder = tmp_path / "net"
    made.save_pretrained(folder)
    net = family.control.load(models, str(folder))
    cond, batch = family.text.encode(models, CAPTIONS), batch_of(side=SIDE)
    found = family.control.residuals(models, net, noise(), torch.tensor([17, 803]), cond, batch)
    context, pooled = cond.tensors["lg_out"], cond.tensors["lg_pooled"]
    context = torch.nn.functional.pad(context, (0, base.joint_attention_dim - context.shape[-1]))
    latents = models.vae.encode(batch.control * 2 - 1).latent_dist.mode()
    positions = kind == "with the pooled text"
    (expected,) = made(
        noise() if positions else models.denoiser.pos_embed(noise()),
        controlnet_cond=(latents - models.vae.config.shift_factor) * models.vae.config.scaling_factor,
        encoder_hidden_states=torch.cat([context, cond.tensors["t5_out"]], 1) if positions else None,
        pooled_projections=pooled,
        timestep=torch.tensor([17, 803]),
        return_dict=False,
    )
    assert_close(torch.stack(found), torch.stack(list(expected)), rtol=0, atol=1e-5)
    if not positions:
        single = family.control.load(models, str(folder / "diffusion_pytorch_model.safetensors"))
        assert not single.config.force_zeros_for_pooled_projection
        again = family.control.residuals(models, single, noise(), torch.tensor([17, 803]), cond, batch)
        assert torch.equal(torch.stack(again), torch.stack(found))


# ---- what cannot be used


def refusal(call):
    with pytest.raises(UserError) as error:
        call()
    (line,) = error.value.problems
    return line


def test_what_cannot_be_trained_is_refused(families, tmp_path):
    (flux, flux_models), (sd3, sd3_models) = families["dev"], families["medium"]
    config = config_of(flux.control.build(flux_models))
    latents = FluxControlNetModel(**{**config, "conditioning_embedding_channels": None})
    latents.save_pretrained(tmp_path / "latents")
    flux.control.save(flux.control.build(flux_models), tmp_path / "f.safetensors", **SAVED)
    without = {k: v for k, v in load_file(tmp_path / "f.safetensors").items() if not k.startswith("input_hint")}
    save_file(without, tmp_path / "g.safetensors")
    wanted = "this ControlNet reads latents of the control image; one with an input_hint_block"
    for name in ("latents", "g.safetensors"):
        line = refusal(partial(flux.control.load, flux_models, str(tmp_path / name)))
        assert line.startswith(f"{tmp_path / name}: {wanted}")
    FluxControlNetModel(**{**config, "num_mode": 3}).save_pretrained(tmp_path / "union")
    for name in ("union", "union/diffusion_pytorch_model.safetensors"):
        line = refusal(partial(flux.control.load, flux_models, str(tmp_path / name)))
        assert "for several kinds of images (Union)" in line
    FluxControlNetModel(**{**config, "num_layers": 0, "num_single_layers": 1}).save_pretrained(tmp_path / "single")
    line = refusal(partial(flux.control.load, flux_models, str(tmp_path / "single")))
    assert line.endswith("has no blocks with two streams, which cannot be trained here")
    config = config_of(sd3.control.build(sd3_models))
    SD3ControlNetModel(**{**config, "extra_conditioning_channels": 1}).save_pretrained(tmp_path / "mask")
    for name in ("mask", "mask/diffusion_pytorch_model.safetensors"):
        line = refusal(partial(sd3.control.load, sd3_models, str(tmp_path / name)))
        assert line.endswith("this ControlNet reads a mask beside the image, which cannot be trained here")
    line = refusal(partial(sd3.control.load, sd3_models, str(tmp_path / "f.safetensors")))
    assert line.endswith("f.safetensors: this is no ControlNet of Stable Diffusion 3 with the names of diffusers")
    large, large_models = families["5-large"]
    SD3ControlNetModel(**{**config, "pooled_projection_dim": 32}).save_pretrained(tmp_path / "other")
    line = refusal(partial(large.control.load, large_models, str(tmp_path / "other")))
    assert line.endswith("this ControlNet is made for another model: pooled_projection_dim is 32, not 160")
