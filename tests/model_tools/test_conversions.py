"""Whole models from one layout to another and back: to the byte where layouts allow, and as diffusers reads them."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from library.families.flux.keymap import flux_map
from library.families.sd.loading import load_model as load_sd
from library.families.sd.saving import save_model
from library.families.sd3.adapter import Sd3Family
from tests.builders import tiny_sd, write_tiny_sd1
from tests.builders.flux import flux_tensors, write_transformer_folder
from tests.builders.sd3 import (
    clip_tensors,
    mmdit_tensors,
    sd3_options,
    sd3_tensors,
    tiny_clip,
    tiny_vae,
    write_encoder_file,
    write_tiny_sd3,
)
from tests.builders.t5 import write_t5_tokenizer

# ---- FLUX.1


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    """A Diffusers folder with the transformer in several shards, as published, and the original tensors."""
    folder = tmp_path_factory.mktemp("flux")
    _, tensors = write_transformer_folder(folder, shards="600KB")
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 2
    return folder, tensors


def first_shard(folder):
    return min((folder / "transformer").glob("*-00001-of-*.safetensors"))


@pytest.mark.rows("C65", "R1", "R2", "R424", "R426")
@pytest.mark.parametrize(
    "where", [lambda f: f, lambda f: f / "transformer", first_shard], ids=["model", "part", "shard"]
)
def test_flux_of_diffusers_becomes_the_original_file(run_script, flux_folder, tmp_path, where):
    folder, tensors = flux_folder
    out = tmp_path / "flux1.safetensors"
    line = ["--diffusers_path", where(folder), "--save_to", out, "--mem_eff_load_save"]
    done = run_script("tools/convert_diffusers_to_flux.py", *line)
    assert done.returncode == 0, done.stderr
    result = load_file(out)
    assert result.keys() == tensors.keys()
    assert all(result[name].equal(tensor) for name, tensor in tensors.items())
    with safe_open(out, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "flux-1-dev"


def test_diffusers_converts_it_back(run_script, flux_folder, tmp_path):
    """Its converter cuts linear1 by the rows of the real model, so that layer has as many here, and is left out."""
    folder, tensors = flux_folder
    out = tmp_path / "flux1.safetensors"
    assert (
        run_script("tools/convert_diffusers_to_flux.py", "--diffusers_path", folder, "--save_to", out).returncode == 0
    )
    result = load_file(out)
    result |= {name: torch.zeros(7 * 3072, *tensor.shape[1:]) for name, tensor in result.items() if "linear1" in name}
    theirs, ours = convert_flux_transformer_checkpoint_to_diffusers(result), flux_map().to_model(tensors)
    assert theirs.keys() == ours.keys()
    compared = [name for name in ours if theirs[name].shape == ours[name].shape]
    assert len(compared) == len(ours) - 2 * 2 * 4  # two single blocks; weights and biases of q, k, v and mlp
    assert all(theirs[name].equal(ours[name]) for name in compared)


@pytest.mark.rows("C65", "R424", "R425")
@pytest.mark.parametrize("precision", ["bf16", "fp8_e4m3fn"])
def test_schnell_in_another_precision_and_nothing_but_the_transformer(run_script, tmp_path, precision):
    _, tensors = write_transformer_folder(tmp_path / "model", "schnell")
    (tmp_path / "model" / "vae").mkdir()
    out = tmp_path / "flux1.safetensors"
    line = ["--diffusers_path", tmp_path / "model", "--save_to", out, "--save_precision", precision]
    assert run_script("tools/convert_diffusers_to_flux.py", *line).returncode == 0
    dtype = {"bf16": torch.bfloat16, "fp8_e4m3fn": torch.float8_e4m3fn}[precision]
    result = load_file(out)
    assert result.keys() == tensors.keys()
    assert all(result[name].float().equal(tensor.to(dtype).float()) for name, tensor in tensors.items())
    with safe_open(out, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "flux-1-schnell"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda t, f: t.pop("proj_out.bias"), "the transformer lacks 1 tensors: proj_out.bias"),
        (lambda t, f: t.update(more=torch.zeros(1)), "1 tensors too many: more"),
        (lambda t, f: t["proj_out.bias"].fill_(float("inf")), "values are NaN or infinite"),
        (lambda t, f: (t.clear(), t.update(flux_tensors("dev"))), "has the original names already"),
        (lambda t, f: (t.clear(), t.update(mmdit_tensors())), "this is a Stable Diffusion 3 model"),
    ],
)
def test_what_is_no_such_transformer_is_refused(run_script, flux_folder, tmp_path, break_it, message):
    folder, tensors = flux_folder
    state = flux_map().to_model(tensors)
    break_it(state, folder)
    save_file(state, tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"earlier")
    done = run_script(
        "tools/convert_diffusers_to_flux.py", "--diffusers_path", tmp_path / "a.safetensors", "--save_to", out
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert out.read_bytes() == b"earlier"


def test_missing_shards_and_wrong_names(run_script, flux_folder, tmp_path):
    folder, _ = flux_folder
    one = first_shard(folder)
    (tmp_path / one.name).write_bytes(one.read_bytes())
    script, out = "tools/convert_diffusers_to_flux.py", tmp_path / "out.safetensors"
    done = run_script(script, "--diffusers_path", tmp_path / one.name, "--save_to", out)
    assert done.returncode == 2
    assert "files of the model are missing" in done.stderr
    done = run_script(script, "--diffusers_path", tmp_path / "none", "--save_to", out)
    assert done.returncode == 2
    assert "no such file or folder" in done.stderr
    done = run_script(script, "--diffusers_path", folder, "--save_to", first_shard(folder))
    assert done.returncode == 2
    assert "would replace what is read" in done.stderr
    done = run_script(script, "--diffusers_path", folder, "--save_to", out, "--save_precision", "int4")
    assert done.returncode == 2
    assert "--save_precision: must be one of" in done.stderr


# ---- Stable Diffusion 3


@pytest.fixture(scope="module")
def sd3_parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    files = {option: write_encoder_file(folder / f"{option}.safetensors", part) for option, part in ENCODERS.items()}
    save_file(mmdit_tensors("5-medium"), folder / "dit.safetensors")
    tiny_vae().save_pretrained(folder / "vae")
    return {**files, "dit": folder / "dit.safetensors", "vae": folder / "vae" / "diffusion_pytorch_model.safetensors"}


ENCODERS = {"clip_l": "te1", "clip_g": "te2", "t5xxl": "te3"}


def bundle(run_script, out, parts, *more):
    options = [word for option, file in parts.items() for word in (f"--{option}", file)]
    return run_script("tools/merge_sd3_safetensors.py", *options, "--output", out, *more)


def test_sd3_parts_become_the_bundle_that_we_read(run_script, sd3_parts, tmp_path):
    out = tmp_path / "sd3.safetensors"
    done = bundle(run_script, out, sd3_parts)
    assert done.returncode == 0, done.stderr
    expected = sd3_tensors("5-medium", encoders=("te1", "te2"))
    result = load_file(out)
    assert all(result[name].equal(tensor) for name, tensor in expected.items())
    others = {name for name in result if name not in expected}
    assert others
    assert all(name.startswith("text_encoders.t5xxl.transformer.") for name in others)
    family = Sd3Family(sd3_options(out, cache=write_t5_tokenizer(tmp_path / "tokenizer")))
    models = family.loader.load()
    assert set(models.text_encoders) == {"te1", "te2", "te3"}
    assert models.vae.state_dict()["decoder.conv_in.weight"].equal(tiny_vae().state_dict()["decoder.conv_in.weight"])
    assert models.source.preserved == ()
    with safe_open(out, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-3-5-medium"


def test_a_part_replaces_that_of_the_denoisers_file(run_script, tmp_path):
    dit = write_tiny_sd3(tmp_path / "dit.safetensors", "medium", encoders=("te1",))
    other = {name: tensor + 1 for name, tensor in clip_tensors(tiny_clip("te1")).items()}
    save_file(other, tmp_path / "clip_l.safetensors")
    out = tmp_path / "out.safetensors"
    parts = {"dit": dit, "clip_l": tmp_path / "clip_l.safetensors"}
    done = bundle(run_script, out, parts, "--save_precision", "fp16", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    result, before = load_file(out), load_file(dit)
    assert result.keys() == before.keys()
    prefix = "text_encoders.clip_l.transformer."
    for name, tensor in before.items():
        expected = other[name.removeprefix(prefix)] if name.startswith(prefix) else tensor
        assert result[name].equal(expected.half())
    assert "without clip_g" in done.stderr


@pytest.mark.parametrize(
    ("option", "part", "message"),
    [
        ("t5xxl", "clip_l", "T5 in transformers' layout is needed here"),
        ("dit", "vae", "this is a VAE; the denoiser of a Stable Diffusion 3 model is needed here"),
        ("vae", "clip_l", "this is a text encoder by itself; a VAE"),
        ("vae", "sd1", "this is a Stable Diffusion 1.x model"),
        ("clip_l", "missing", "no such file"),
    ],
)
def test_wrong_parts_are_named(run_script, sd3_parts, tmp_path, option, part, message):
    wrong = tmp_path / "missing" if part == "missing" else sd3_parts.get(part)
    if part == "sd1":
        wrong = write_tiny_sd1(tmp_path / "sd1.safetensors")
    done = bundle(run_script, tmp_path / "out.safetensors", {**sd3_parts, option: wrong})
    assert done.returncode == 2
    assert f"error: --{option}: {wrong}: " in done.stderr
    assert message in done.stderr


# ---- Stable Diffusion 1.x and 2.x


SCRIPT = "tools/convert_diffusers20_original_sd.py"


def test_sd_there_and_back(run_script, tmp_path):
    source = write_tiny_sd1(tmp_path / "model.safetensors", dtype=torch.float16)
    folder, again = tmp_path / "folder", tmp_path / "again.safetensors"
    done = run_script(SCRIPT, source, folder, "--use_safetensors")
    assert done.returncode == 0, done.stderr
    assert load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.bias"].dtype == torch.float16
    done = run_script(SCRIPT, folder, again, "--metadata", "{'name': 'mine'}")
    assert done.returncode == 0, done.stderr
    before, after = load_file(source), load_file(again)
    assert before.keys() == after.keys()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    with safe_open(again, "pt") as file:
        metadata = file.metadata()
    assert metadata["name"] == "mine"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    content = again.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(tensors).hexdigest()


def test_sd_weights_that_are_no_numbers_are_refused(run_script, tmp_path):
    source = write_tiny_sd1(tmp_path / "model.safetensors")
    tensors = load_file(source)
    tensors["first_stage_model.decoder.conv_in.bias"][0] = 1e6
    save_file(tensors, tmp_path / "huge.safetensors")
    done = run_script(SCRIPT, tmp_path / "huge.safetensors", tmp_path / "folder", "--fp16")
    assert done.returncode == 2
    assert "1 of 32 values are NaN or infinite in float16" in done.stderr
    assert not (tmp_path / "folder").exists()


def test_diffusers_reads_both_directions(run_script, tmp_path):
    source = write_tiny_sd1(tmp_path / "model.safetensors")
    folder, file = tmp_path / "folder", tmp_path / "again.ckpt"
    assert run_script(SCRIPT, source, folder, "--v1").returncode == 0
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    parts = load_sd(str(source), v2=False)
    assert pipe.unet.state_dict().keys() == parts.denoiser.state_dict().keys()
    assert all(pipe.unet.state_dict()[name].equal(value) for name, value in parts.denoiser.state_dict().items())
    done = run_script(SCRIPT, folder, file, "--epoch", "3", "--global_step", "70", "--bf16")
    assert done.returncode == 0, done.stderr
    content = torch.load(file, weights_only=True)
    assert (content["epoch"], content["global_step"]) == (3, 70)
    vae = AutoencoderKL.from_single_file(content["state_dict"], config=str(folder / "vae"), local_files_only=True)
    for name, value in parts.vae.state_dict().items():
        assert_close(vae.state_dict()[name].float(), value.bfloat16().float(), rtol=0, atol=0)


def test_versions_schedulers_and_projections(run_script, tmp_path):
    models = tiny_sd(v2=True)
    save_model(models, tmp_path / "v2.safetensors", save_as="safetensors", dtype=None, metadata={})
    squared = load_file(tmp_path / "v2.safetensors")
    for name, tensor in squared.items():
        if name.endswith(("proj_in.weight", "proj_out.weight")) and tensor.dim() == 2:
            squared[name] = tensor[:, :, None, None]
    save_file(squared, tmp_path / "v2.safetensors")
    plain = run_script(SCRIPT, tmp_path / "v2.safetensors", tmp_path / "plain", "--use_safetensors")
    assert plain.returncode == 0, plain.stderr
    assert "does not say whether it predicts noise or v" in plain.stderr

    def read(folder, part):
        return json.loads((tmp_path / folder / part).read_text())

    assert read("plain", "unet/config.json")["use_linear_projection"] is False
    assert read("plain", "scheduler/scheduler_config.json")["prediction_type"] == "epsilon"
    config = read("plain", "scheduler/scheduler_config.json") | {"prediction_type": "v_prediction", "steps_offset": 7}
    (tmp_path / "plain/scheduler/scheduler_config.json").write_text(json.dumps(config))
    line = [
        tmp_path / "v2.safetensors",
        tmp_path / "linear",
        "--use_safetensors",
        "--unet_use_linear_projection",
        "--v2",
    ]
    done = run_script(SCRIPT, *line, "--reference_model", tmp_path / "plain")
    assert done.returncode == 0, done.stderr
    assert read("linear", "unet/config.json")["use_linear_projection"] is True
    assert read("linear", "scheduler/scheduler_config.json")["steps_offset"] == 7
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "linear", local_files_only=True)
    assert pipe.unet.config.use_linear_projection
    state = pipe.unet.state_dict()
    assert all(state[name].equal(value) for name, value in models.denoiser.state_dict().items())


def test_variants(run_script, tmp_path):
    save_model(tiny_sd(), tmp_path / "m", save_as="diffusers_safetensors", dtype=None, metadata={})
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        file = tmp_path / "m" / part / f"{name}.safetensors"
        half = {key: (value * 2).half() for key, value in load_file(file).items()}
        save_file(half, file.with_name(f"{name}.fp16.safetensors"), {"format": "pt"})
    assert run_script(SCRIPT, tmp_path / "m", tmp_path / "half.safetensors", "--variant", "fp16").returncode == 0
    assert run_script(SCRIPT, tmp_path / "m", tmp_path / "whole.safetensors").returncode == 0
    half, whole = load_file(tmp_path / "half.safetensors"), load_file(tmp_path / "whole.safetensors")
    name = "model.diffusion_model.input_blocks.0.0.bias"
    assert whole[name].dtype == torch.float32
    assert half[name].equal((whole[name] * 2).half())
    done = run_script(SCRIPT, tmp_path / "m", tmp_path / "none.safetensors", "--variant", "int8")
    assert done.returncode == 2
    assert "cannot be loaded" in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--v1", "--v2"], "--v1 and --v2 exclude each other"),
        (["--fp16", "--bf16"], "choose one precision"),
        (["--metadata", "[1]"], "--metadata: must be a dictionary"),
        (["--v2"], "this is a Stable Diffusion 1.x model; remove --v2"),
    ],
)
def test_wrong_options_of_the_converter(run_script, tmp_path, more, message):
    source = write_tiny_sd1(tmp_path / "model.safetensors")
    done = run_script(SCRIPT, source, tmp_path / "out.safetensors", *more)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_folder_of_something_else_is_not_replaced(run_script, tmp_path):
    source = write_tiny_sd1(tmp_path / "model.safetensors")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    done = run_script(SCRIPT, source, tmp_path / "notes")
    assert done.returncode == 2
    assert "holds something else than a Diffusers model" in done.stderr
    done = run_script(SCRIPT, source, source)
    assert done.returncode == 2
    assert "would replace what is read" in done.stderr
