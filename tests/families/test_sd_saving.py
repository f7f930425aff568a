"""Saving SD 1.x/2.x: what is read and written again is the same file, and diffusers opens what is written."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from library.errors import UserError
from library.families.sd.adapter import SdFamily
from library.families.sd.loading import load_model
from library.families.shared.clip import public_state
from tests.builders import sd_options, tiny_sd, write_tiny_sd1, write_tiny_sd2

WRITE = {False: write_tiny_sd1, True: write_tiny_sd2}


@pytest.fixture(scope="module", params=[False, True], ids=["sd1", "sd2"])
def v2(request):
    return request.param


def published(path, v2: bool) -> dict[str, torch.Tensor]:
    """A file as model authors publish them: half precision, a float32 VAE, and more than the model needs."""
    tensors = load_file(WRITE[v2](path.with_name("written.safetensors")))
    tensors = {k: v if k.startswith("first_stage_model") else v.half() for k, v in tensors.items()}
    tensors |= {
        "alphas_cumprod": torch.rand(1000, dtype=torch.float64),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "v_pred": torch.zeros(0),
    }
    if not v2:
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path, {"format": "pt"})
    return tensors


def family_for(path, v2: bool, **options) -> SdFamily:
    return SdFamily(sd_options(path, v2=v2, **options))


@pytest.mark.rows("R123")
def test_reading_and_writing_gives_the_same_bytes(v2, tmp_path):
    published(tmp_path / "model.safetensors", v2)
    family = family_for(tmp_path / "model.safetensors", v2, v_parameterization=True)
    family.writer.save(
        family.loader.load(),
        tmp_path / "again.safetensors",
        save_as="safetensors",
        dtype=None,
        metadata={"format": "pt"},
    )
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.rows("R118")
def test_ckpt_round_trip_adds_to_the_counters(v2, tmp_path):
    tensors = published(tmp_path / "model.safetensors", v2)
    torch.save({"state_dict": tensors, "epoch": 2, "global_step": 300}, tmp_path / "model.ckpt")
    family = family_for(tmp_path / "model.ckpt", v2, v_parameterization=True)
    metadata = {"ss_epoch": "3", "ss_steps": "40"}
    family.writer.save(family.loader.load(), tmp_path / "again.ckpt", save_as="ckpt", dtype=None, metadata=metadata)
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)
    assert (again["epoch"], again["global_step"]) == (5, 340)
    assert set(again["state_dict"]) == set(tensors)
    for key, value in tensors.items():
        assert again["state_dict"][key].dtype == value.dtype, key
        assert torch.equal(again["state_dict"][key], value), key


@pytest.mark.rows("R121")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision_is_that_of_every_used_tensor(tmp_path, dtype):
    published(tmp_path / "model.safetensors", False)
    family = family_for(tmp_path / "model.safetensors", False)
    family.writer.save(
        family.loader.load(), tmp_path / "again.safetensors", save_as="safetensors", dtype=dtype, metadata={"a": "b"}
    )
    again = load_file(tmp_path / "again.safetensors")
    for part in ("model.diffusion_model.", "first_stage_model.encoder.", "cond_stage_model.transformer.text_model.enc"):
        assert {v.dtype for k, v in again.items() if k.startswith(part)} == {dtype}
    assert again["alphas_cumprod"].dtype == torch.float64  # not of the model: as it was
    with safe_open(tmp_path / "again.safetensors", "pt") as file:
        assert file.metadata() == {"a": "b"}


def test_trained_weights_are_what_is_written(tmp_path):
    path = write_tiny_sd1(tmp_path / "model.safetensors", dtype=torch.float16)
    family = family_for(path, False)
    models = family.loader.load()
    for model in (models.denoiser, models.vae, models.text_encoders["te"]):
        for parameter in model.parameters():
            parameter.data += 1
    family.writer.save(models, tmp_path / "trained.safetensors", save_as="safetensors", dtype=None, metadata={})
    before, after = load_file(path), load_file(tmp_path / "trained.safetensors")
    assert set(before) == set(after)
    for key in before:  # the sum in float32, rounded once to float16
        assert torch.equal(after[key], (before[key].float() + 1).half()), key


def test_saving_over_the_source_keeps_what_training_does_not_use(tmp_path):
    tensors = published(tmp_path / "model.safetensors", True)
    family = family_for(tmp_path / "model.safetensors", True, v_parameterization=True)
    models = family.loader.load()
    for _ in range(2):
        family.writer.save(models, tmp_path / "model.safetensors", save_as="safetensors", dtype=None, metadata={})
    assert set(load_file(tmp_path / "model.safetensors")) == set(tensors)


def test_a_source_that_vanished_costs_only_the_unused_tensors(tmp_path, caplog):
    published(tmp_path / "model.safetensors", False)
    family = family_for(tmp_path / "model.safetensors", False)
    models = family.loader.load()
    (tmp_path / "model.safetensors").unlink()
    family.writer.save(models, tmp_path / "again.safetensors", save_as="safetensors", dtype=None, metadata={})
    assert "alphas_cumprod" not in load_file(tmp_path / "again.safetensors")
    assert_same(load_model(str(tmp_path / "again.safetensors"), False), models)


@pytest.mark.rows("R123", "R128")
def test_the_given_vae_is_in_the_saved_model(tmp_path):
    path = write_tiny_sd1(tmp_path / "model.safetensors")
    other = write_tiny_sd1(tmp_path / "other.safetensors", seed=5, dtype=torch.bfloat16)
    family = family_for(path, False, vae=str(other))
    models = family.loader.load()
    models.vae = None  # dropped after latents were cached
    family.writer.save(models, tmp_path / "again.safetensors", save_as="safetensors", dtype=None, metadata={})
    again, model, vae = (load_file(p) for p in (tmp_path / "again.safetensors", path, other))
    for key, value in again.items():
        expected = (vae if key.startswith("first_stage_model.") else model)[key]
        assert value.dtype == expected.dtype, key
        assert torch.equal(value, expected), key


def assert_same(parts, models) -> None:
    pairs = [(parts.denoiser, models.denoiser), (parts.vae, models.vae)]
    states = [(a.state_dict(), b.state_dict()) for a, b in pairs]
    states.append((public_state(parts.text_encoder), public_state(models.text_encoders["te"])))
    for ours, expected in states:
        assert set(ours) == set(expected)
        for name, value in expected.items():
            assert torch.equal(ours[name], value), name


@pytest.mark.rows("R118", "R119", "R122")
@pytest.mark.parametrize("save_as", ["diffusers", "diffusers_safetensors"])
def test_diffusers_opens_the_folder_offline(v2, save_as, tmp_path):
    """Its own pipeline runs one step, and the parts equal the models that were saved."""
    family = family_for(WRITE[v2](tmp_path / "model.safetensors"), v2, v_parameterization=v2)
    models = family.loader.load()
    family.writer.save(models, tmp_path / "pipe", save_as=save_as, dtype=torch.float16, metadata={})
    weights = {p.suffix for p in (tmp_path / "pipe").rglob("*") if p.stat().st_size > 100_000 and "tok" not in str(p)}
    assert weights == {".bin" if save_as == "diffusers" else ".safetensors"}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", local_files_only=True)
    assert pipeline.safety_checker is None
    assert pipeline.scheduler.config.prediction_type == ("v_prediction" if v2 else "epsilon")
    betas = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")
    assert [pipeline.scheduler.config[name] for name in betas] == [0.00085, 0.012, "scaled_linear", 1000]
    assert pipeline.tokenizer.pad_token_id == (0 if v2 else 49407)
    assert pipeline.tokenizer("a red house").input_ids == [49406, 320, 736, 1212, 49407]
    assert pipeline.unet.dtype == torch.float32  # save_precision acts on single files only
    out = pipeline("a red house", num_inference_steps=1, output_type="latent", height=64, width=64)
    assert torch.isfinite(out.images).all()
    with torch.no_grad():
        ids = torch.tensor([[49406, 320, 736, 1212, 49407]])
        assert_close(pipeline.text_encoder(ids)[0], models.text_encoders["te"](ids)[0])
    assert_same(load_model(str(tmp_path / "pipe"), v2), models)


def test_the_folder_has_the_names_that_older_readers_ask_for(tmp_path):
    family = family_for(write_tiny_sd1(tmp_path / "model.safetensors"), False)
    family.writer.save(
        family.loader.load(), tmp_path / "pipe", save_as="diffusers_safetensors", dtype=None, metadata={}
    )
    names = load_file(tmp_path / "pipe" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= set(os.listdir(tmp_path / "pipe" / "tokenizer"))
    assert (
        json.loads((tmp_path / "pipe" / "text_encoder" / "config.json").read_text())["model_type"] == "clip_text_model"
    )


def test_folder_keeps_its_scheduler_and_becomes_a_file(v2, tmp_path):
    folder = WRITE[v2](tmp_path / "folder")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "PNDMScheduler"}))
    family = family_for(folder, v2)
    models = family.loader.load()
    assert models.source.save_as == "diffusers_safetensors"
    family.writer.save(models, tmp_path / "again", save_as="diffusers_safetensors", dtype=None, metadata={})
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "PNDMScheduler"]
    family.writer.save(models, tmp_path / "file.safetensors", save_as="safetensors", dtype=torch.float16, metadata={})
    file = load_file(tmp_path / "file.safetensors")
    assert {v.dtype for v in file.values()} == {torch.float16}
    if v2:  # what OpenCLIP's readers count on
        prefix = "cond_stage_model.model."
        blocks = f"{prefix}transformer.resblocks."
        assert torch.equal(file[f"{blocks}3.mlp.c_fc.weight"], file[f"{blocks}2.mlp.c_fc.weight"])
        assert torch.equal(file[f"{prefix}text_projection"], torch.ones(64, 64).half())
        assert file[f"{prefix}logit_scale"] == 1
    half = {k: v.half().float() for k, v in models.denoiser.state_dict().items()}
    loaded = load_model(str(tmp_path / "file.safetensors"), v2).denoiser.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in half.items())


def test_a_half_precision_folder_becomes_a_half_precision_file(tmp_path):
    models = tiny_sd()
    folder = write_tiny_sd1(tmp_path / "folder")
    models.denoiser.half().save_pretrained(folder / "unet")
    family = family_for(folder, False)
    family.writer.save(
        family.loader.load(), tmp_path / "file.safetensors", save_as="safetensors", dtype=None, metadata={}
    )
    file = load_file(tmp_path / "file.safetensors")
    assert {v.dtype for k, v in file.items() if k.startswith("model.")} == {torch.float16}
    assert {v.dtype for k, v in file.items() if not k.startswith("model.")} == {torch.float32}


def test_a_failed_save_leaves_the_earlier_model(tmp_path):
    path = write_tiny_sd1(tmp_path / "model.safetensors")
    family = family_for(path, False)
    models = family.loader.load()
    before = path.read_bytes()
    models.denoiser.register_parameter("surplus", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(UserError, match="surplus"):
        family.writer.save(models, path, save_as="safetensors", dtype=None, metadata={})
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="--save_model_as zip"):
        family.writer.save(models, path, save_as="zip", dtype=None, metadata={})
