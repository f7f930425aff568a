"""Loading SD 1.x/2.x. References: the modules a file was made from, and diffusers' own single-file converters."""

from __future__ import annotations

import json
import os

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel

from library.errors import UserError
from library.families.sd.adapter import SdFamily
from library.families.sd.loading import load_model, load_vae
from library.families.sd.variants import check_paths
from library.families.shared.clip import final_layer_norm, live_name, public_state
from library.options.parsing import parse_options
from library.registry import groups_for
from library.types import Models
from tests.builders import sd_options, tiny_sd, write_tiny_sd1, write_tiny_sd2
from tests.builders.rights import without_rights

WRITE = {False: write_tiny_sd1, True: write_tiny_sd2}


@pytest.fixture(scope="module", params=[False, True], ids=["sd1", "sd2"])
def v2(request):
    return request.param


@pytest.fixture(scope="module")
def original(v2) -> Models:
    return tiny_sd(v2)


@pytest.fixture(scope="module")
def single_file(v2, tmp_path_factory):
    return WRITE[v2](tmp_path_factory.mktemp("single") / "tiny.safetensors")


@pytest.fixture(scope="module")
def theirs(original, tmp_path_factory):
    """The folder as diffusers itself writes it."""
    folder = tmp_path_factory.mktemp("theirs") / "pipe"
    pipeline = StableDiffusionPipeline(
        vae=original.vae,
        text_encoder=original.text_encoders["te"],
        tokenizer=original.tokenizers["te"],
        unet=original.denoiser,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def assert_same_state(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def assert_same_model(parts, original: Models) -> None:
    assert_same_state(parts.denoiser.state_dict(), original.denoiser.state_dict())
    assert_same_state(parts.vae.state_dict(), original.vae.state_dict())
    assert_same_state(public_state(parts.text_encoder), public_state(original.text_encoders["te"]))
    for model in (parts.denoiser, parts.vae, parts.text_encoder):
        assert not model.training
        assert not any(p.requires_grad or p.is_meta or p.dtype != torch.float32 for p in model.parameters())


@pytest.mark.rows("R114", "R115")
def test_file_ckpt_and_folder_are_the_same_model(v2, original, single_file, theirs, tmp_path):
    ckpt = WRITE[v2](tmp_path / "tiny.ckpt")
    for path in (single_file, ckpt, theirs):
        assert_same_model(load_model(str(path), v2), original)


@pytest.mark.rows("R190")
def test_files_and_folders_go_straight_to_the_default_device(v2, original, single_file, theirs):
    """With a device whose name is another than the CPU's own, though it is the CPU: what --lowram does on a GPU."""
    for path in (single_file, theirs):
        with torch.device("cpu", 0):
            parts = load_model(str(path), v2)
        assert_same_model(parts, original)
        placed = getattr(parts.denoiser, "hf_device_map", None)
        assert placed == (None if path is single_file else {"": torch.device("cpu", 0)})
        assert parts.text_encoder.to(torch.bfloat16).dtype == torch.bfloat16


def test_unet_agrees_with_diffusers_converter(v2, single_file):
    """diffusers reads the single file with code of its own; its names and values must be those of our U-Net."""
    unet = load_model(str(single_file), v2).denoiser
    assert_same_state(convert_ldm_unet_checkpoint(load_file(single_file), unet.config), unet.state_dict())


def test_vae_agrees_with_diffusers_converter(v2, single_file):
    vae = load_model(str(single_file), v2).vae
    assert load_file(single_file)["first_stage_model.encoder.mid.attn_1.q.weight"].ndim == 4
    assert_same_state(convert_ldm_vae_checkpoint(load_file(single_file), vae.config), vae.state_dict())


def test_text_encoder_agrees_with_diffusers_converter(v2, single_file):
    text_encoder = load_model(str(single_file), v2).text_encoder
    file, ours = load_file(single_file), public_state(text_encoder)
    if not v2:
        assert_same_state(ours, convert_ldm_clip_checkpoint(file, remove_prefix="cond_stage_model.transformer."))
        return
    expected = convert_open_clip_checkpoint(text_encoder, file)
    layers = text_encoder.config.num_hidden_layers
    left_out = {name for name in expected if f".layers.{layers}." in name} | {"text_projection.weight"}
    assert len(left_out) == 17  # the layer that is never run, and the projection
    assert_same_state(ours, {name: value for name, value in expected.items() if name not in left_out})


def test_one_prediction_and_latents_equal_diffusers(v2, single_file, theirs):
    """float32, same kernels: 1e-5 leaves room for another order of summation in linear and 1x1 convolution."""
    family = SdFamily(sd_options(single_file, v2=v2))
    models = family.loader.load()
    pipeline = StableDiffusionPipeline.from_pretrained(theirs, safety_checker=None)
    noisy, times = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        cond = family.text.encode(models, ["a red house", "!"])
        ids = pipeline.tokenizer(["a red house", "!"], padding="max_length", max_length=77, return_tensors="pt")
        states = pipeline.text_encoder(ids.input_ids).last_hidden_state
        assert_close(cond.tensors["context"], states, atol=1e-5, rtol=0)
        ours = family.denoiser.predict(models, noisy, times, cond)
        assert_close(ours, pipeline.unet(noisy, times, states).sample, atol=1e-5, rtol=0)
        latents = family.latents.encode(models, pixels, torch.Generator().manual_seed(3))
        posterior = pipeline.vae.encode(pixels).latent_dist
        eps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        assert_close(latents, posterior.mean + posterior.std * eps, atol=1e-5, rtol=0)
        assert_close(family.latents.scale(latents), latents * 0.18215)
        decoded = family.latents.decode(models, family.latents.scale(latents))
        assert_close(decoded, pipeline.vae.decode(latents).sample, atol=1e-4, rtol=0)


@pytest.mark.rows("R134")
def test_what_v2_changes():
    for is_v2, heads, activation in ((False, [8] * 4, "quick_gelu"), (True, [1] * 4, "gelu")):
        models = tiny_sd(is_v2)
        attention = [m for m in models.denoiser.modules() if type(m).__name__ == "Attention"]
        assert {a.heads for a in attention} == set(heads)
        assert models.text_encoders["te"].config.hidden_act == activation


@pytest.mark.rows("R132", "R135")
def test_v_parameterization_changes_what_is_predicted_and_nothing_else(tmp_path):
    path, original = write_tiny_sd2(tmp_path / "tiny.safetensors"), tiny_sd(True)
    latents, times = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    draws = {}
    for flags in (("--v2",), ("--v2", "--v_parameterization")):
        opts = parse_options(groups_for("sd", "network"), [f"--pretrained_model_name_or_path={path}", *flags])
        family = SdFamily(opts)
        models = family.loader.load()
        assert_same_state(models.denoiser.state_dict(), original.denoiser.state_dict())
        assert_same_state(public_state(models.text_encoders["te"]), public_state(original.text_encoders["te"]))
        assert models.tokenizers["te"].pad_token_id == 0
        objective = family.denoiser.objective()
        draws[flags[-1]] = objective.draw(latents, torch.Generator().manual_seed(3), times)
    base, v = draws["--v2"], draws["--v_parameterization"]
    assert torch.equal(base.noisy, v.noisy)
    assert torch.equal(base.target, base.noise)
    # float32 tables on both sides
    assert_close(v.target, scheduler.get_velocity(latents, v.noise, times), atol=1e-5, rtol=0)


@pytest.mark.rows("R21")
def test_v2_takes_the_layer_before_the_last(tmp_path):
    """The file's last layer is a layer of its own here. Reference: the whole encoder in transformers, told to skip."""
    tensors = load_file(write_tiny_sd2(tmp_path / "written.safetensors"))
    last = "cond_stage_model.model.transformer.resblocks.3."
    tensors |= {key: torch.randn_like(value) / 8 for key, value in tensors.items() if key.startswith(last)}
    save_file(tensors, tmp_path / "model.safetensors")
    family = SdFamily(sd_options(tmp_path / "model.safetensors", v2=True))
    models = family.loader.load()
    ours = models.text_encoders["te"]
    assert ours.config.num_hidden_layers == 3

    whole = CLIPTextModel(CLIPTextConfig(**{**ours.config.to_dict(), "num_hidden_layers": 4})).eval()
    converted = convert_open_clip_checkpoint(whole, tensors)
    whole.load_state_dict({live_name(whole, k): v for k, v in converted.items() if k != "text_projection.weight"})
    ids = models.tokenizers["te"](["a red house"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        states = whole(ids, output_hidden_states=True)
        actual = family.text.encode(models, ["a red house"]).tensors["context"]
        assert_close(actual, final_layer_norm(whole)(states.hidden_states[-2]), atol=1e-5, rtol=0)
        assert (actual - states.last_hidden_state).abs().max() > 1e-2


def test_shapes_decide_widths_depths_and_heads(tmp_path):
    """Another shape than the usual one: three levels, two layers, no attention at the top."""
    from diffusers import UNet2DConditionModel

    from library.families.sd.saving import save_model

    models = tiny_sd(True)
    models.denoiser = UNet2DConditionModel(
        block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 1),
        cross_attention_dim=64,
        attention_head_dim=(1, 2, 3),
        use_linear_projection=True,
    ).eval()
    save_model(models, tmp_path / "odd.safetensors", save_as="safetensors", dtype=None, metadata={})
    unet = load_model(str(tmp_path / "odd.safetensors"), True).denoiser
    assert_same_state(unet.state_dict(), models.denoiser.state_dict())
    arguments = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 77, 64)
    with torch.no_grad():
        assert_close(unet(*arguments).sample, models.denoiser(*arguments).sample, atol=1e-5, rtol=0)


def test_names_without_text_model_level_and_position_ids(tmp_path):
    old = {k.replace("text_model.", ""): v for k, v in load_file(write_tiny_sd1(tmp_path / "a.safetensors")).items()}
    old["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(old, tmp_path / "old.safetensors")
    parts = load_model(str(tmp_path / "old.safetensors"), False)
    assert_same_model(parts, tiny_sd(False))
    assert parts.source.preserved == ("cond_stage_model.transformer.embeddings.position_ids",)


@pytest.mark.rows("R127")
def test_vae_from_every_kind_of_place(tmp_path):
    other = tiny_sd(False, seed=9).vae.state_dict()
    model = write_tiny_sd1(tmp_path / "model.safetensors", seed=9)
    folder = write_tiny_sd1(tmp_path / "folder", seed=9)
    inside = {k: v for k, v in load_file(model).items() if k.startswith("first_stage_model.")}
    bare = {k.removeprefix("first_stage_model."): v for k, v in inside.items()}
    save_file(inside, tmp_path / "prefixed.safetensors")
    save_file(bare, tmp_path / "bare.safetensors")
    torch.save({"state_dict": bare | {"loss.logvar": torch.zeros(1)}}, tmp_path / "vae.pt")
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    diffusers = {}
    for key, value in other.items():
        for now, was in old_names.items():
            key = key.replace(f".{now}.", f".{was}.")
        diffusers[key] = value
    torch.save(diffusers, tmp_path / "diffusion_pytorch_model.bin")
    places = [model, folder, folder / "vae", tmp_path / "prefixed.safetensors", tmp_path / "bare.safetensors"]
    for place in [*places, tmp_path / "vae.pt", tmp_path / "diffusion_pytorch_model.bin"]:
        assert_same_state(load_vae(str(place))[0].state_dict(), other)
    parts = load_model(str(write_tiny_sd1(tmp_path / "base.safetensors")), False, str(tmp_path / "vae.pt"))
    assert_same_state(parts.vae.state_dict(), other)


@pytest.mark.rows("R116")
def test_hub_id_is_found_in_the_cache_without_the_network(tmp_path, monkeypatch):
    import huggingface_hub.constants

    repository, revision = tmp_path / "hub" / "models--someone--tiny", "0" * 40
    write_tiny_sd1(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    family = SdFamily(sd_options("someone/tiny", vae="someone/tiny"))
    models = family.loader.load()
    assert_same_state(models.denoiser.state_dict(), tiny_sd().denoiser.state_dict())
    assert_same_state(models.vae.state_dict(), tiny_sd().vae.state_dict())
    assert models.tokenizers["te"].name_or_path == "someone/tiny"


@pytest.mark.rows("R133")
def test_a_model_of_the_other_version_is_refused(tmp_path):
    for name in ("m.safetensors", "m.ckpt", "folder"):
        with pytest.raises(UserError, match=r"this is a Stable Diffusion 2\.x model; add --v2"):
            load_model(str(write_tiny_sd2(tmp_path / "2" / name)), False)
        with pytest.raises(UserError, match=r"this is a Stable Diffusion 1\.x model; remove --v2"):
            load_model(str(write_tiny_sd1(tmp_path / "1" / name)), True)


# --- parts that an option replaces ------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["none", "broken"])
@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt", "0a1b2c"])
def test_a_vae_that_is_replaced_is_not_needed(v2, original, single_file, tmp_path, inner, name):
    tensors = {k: v for k, v in load_file(single_file).items() if not k.startswith("first_stage_model.")}
    vae = WRITE[v2](tmp_path / "whole.safetensors", seed=9)
    if inner == "broken":
        tensors["first_stage_model.encoder.conv_in.weight"] = torch.zeros(3)
    path = tmp_path / name
    torch.save(tensors, path) if name.endswith(".ckpt") else save_file(tensors, path)
    assert check_paths(sd_options(path, v2=v2, vae=str(vae))) == []
    parts = load_model(str(path), v2, str(vae))
    assert_same_state(parts.denoiser.state_dict(), original.denoiser.state_dict())
    assert_same_state(parts.vae.state_dict(), tiny_sd(v2, seed=9).vae.state_dict())
    assert not any(key.startswith("first_stage_model.") for key in parts.source.preserved)
    if inner == "none":
        assert check_paths(sd_options(path, v2=v2)) == [
            f"--pretrained_model_name_or_path: {path}: holds no VAE; give one with --vae"
        ]
        with pytest.raises(UserError, match="holds no VAE; give one with --vae"):
            load_model(str(path), v2)
        with pytest.raises(UserError, match="holds no VAE"):
            load_vae(str(path))


def test_a_folder_without_vae(tmp_path):
    import shutil

    folder, vae = write_tiny_sd1(tmp_path / "folder"), write_tiny_sd1(tmp_path / "vae.safetensors", seed=9)
    shutil.rmtree(folder / "vae")
    assert check_paths(sd_options(folder, vae=str(vae))) == []
    assert_same_state(load_model(str(folder), False, str(vae)).vae.state_dict(), tiny_sd(seed=9).vae.state_dict())
    assert "holds no VAE; give one with --vae" in check_paths(sd_options(folder))[0]
    with pytest.raises(UserError, match=r"folder: holds no VAE; give one with --vae"):
        load_model(str(folder), False)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (9, "this is an inpainting model: its U-Net takes 9 channels"),
        (8, "this is an instruct-pix2pix model: its U-Net takes 8 channels"),
        (6, "its U-Net takes 6 channels; only those that take 4 can be trained here"),
    ],
)
@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt", "folder"])
def test_other_input_channels_are_named_early_and_at_loading(tmp_path, channels, message, name):
    path = write_tiny_sd1(tmp_path / name)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    if name == "folder":
        config = path / "unet" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": channels}))
    else:
        tensors = load_file(path) if name == "m.safetensors" else torch.load(path, weights_only=True)["state_dict"]
        tensors[first] = torch.zeros(tensors[first].shape[0], channels, 3, 3)
        save_file(tensors, path) if name == "m.safetensors" else torch.save(tensors, path)
    (problem,) = check_paths(sd_options(path))
    assert problem.startswith(f"--pretrained_model_name_or_path: {path}: {message}")
    with pytest.raises(UserError, match=message):
        load_model(str(path), False)


def test_a_file_is_saved_again_as_what_it_is(tmp_path):
    for written, name, kind in (("m.safetensors", "x.ckpt", "safetensors"), ("m.ckpt", "0a1b2c", "ckpt")):
        path = write_tiny_sd1(tmp_path / written).rename(tmp_path / name)
        assert load_model(str(path), False).source.save_as == kind


def test_the_index_of_a_folder_as_the_model(tmp_path):
    folder = write_tiny_sd1(tmp_path / "folder")
    (problem,) = check_paths(sd_options(folder / "model_index.json"))
    assert problem.endswith(f"model_index.json: this is the index of a Diffusers model; give its folder, {folder}")


def test_incomplete_and_odd_files_are_refused(tmp_path):
    whole = load_file(write_tiny_sd1(tmp_path / "whole.safetensors"))

    def message(change: dict, drop: str = "-") -> str:
        save_file({k: v for k, v in (whole | change).items() if drop not in k}, tmp_path / "odd.safetensors")
        with pytest.raises(UserError) as caught:
            load_model(str(tmp_path / "odd.safetensors"), False)
        return str(caught.value)

    unet = "model.diffusion_model."
    assert "the U-Net lacks 1 tensors: conv_out.bias" in message({}, "model.diffusion_model.out.2.bias")
    assert "label_emb.0.0.weight" in message({f"{unet}label_emb.0.0.weight": torch.zeros(1)})
    assert "inpainting" in message({f"{unet}input_blocks.0.0.weight": torch.zeros(64, 9, 3, 3)})
    assert "time_embedding.linear_1.bias has shape (3,)" in message({f"{unet}time_embed.0.bias": torch.zeros(3)})
    assert "without a text encoder" in message({}, "cond_stage_model")
    assert "odd.safetensors: " in message({}, "first_stage_model")


def test_missing_model_is_refused(tmp_path, monkeypatch):
    import huggingface_hub.constants

    with pytest.raises(UserError, match="no such file or folder"):
        load_model(str(tmp_path / "nothing.safetensors"), False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"someone/nothing.*nor in the hub's cache, and the hub does not provide it"):
        load_model("someone/nothing", False)
    os.makedirs(tmp_path / "empty")
    with pytest.raises(UserError, match=r"unet/config\.json is missing"):
        load_model(str(tmp_path / "empty"), False)


def test_a_model_that_may_not_be_looked_at_is_no_missing_one(tmp_path):
    """Neither a file in a folder that is closed, nor a closed folder of a model, nor one with a closed part."""
    opts = parse_options(groups_for("sd", "network"), [f"--pretrained_model_name_or_path={tmp_path / 'closed' / 'm'}"])
    unet = tmp_path / "closed" / "m" / "unet"
    unet.mkdir(parents=True)
    (unet / "config.json").write_text("{}")
    flag = "--pretrained_model_name_or_path: "
    unet.chmod(0)
    assert without_rights(lambda: check_paths(opts)) == [f"{flag}{unet / 'config.json'}: Permission denied"]
    (tmp_path / "closed").chmod(0)
    assert without_rights(lambda: check_paths(opts)) == [
        f"{flag}{tmp_path / 'closed' / 'm'}: it cannot be examined (Permission denied)"
    ]
