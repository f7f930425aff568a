"""Saving SDXL: what is read and written again is the same file, and diffusers opens what is written."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from library.families.sdxl.adapter import SdxlFamily
from library.families.sdxl.loading import load_model
from library.families.shared.clip import public_state
from tests.builders.sdxl import sdxl_options, write_tiny_sdxl

TE2 = "conditioner.embedders.1.model."


def published(path) -> dict[str, torch.Tensor]:
    """A file as model authors publish them: half precision, a float32 VAE, and more than the model needs."""
    tensors = load_file(write_tiny_sdxl(path.with_name("written.safetensors")))
    tensors = {k: v if k.startswith("first_stage_model") else v.half() for k, v in tensors.items()}
    tensors |= {
        "v_pred": torch.zeros(0),
        "ztsnr": torch.zeros(0),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        f"{TE2}logit_scale": torch.tensor(4.6, dtype=torch.float16),
        "denoiser.sigmas": torch.rand(1000),
    }
    save_file(tensors, path, {"format": "pt"})
    return tensors


def family_for(path, **options) -> SdxlFamily:
    return SdxlFamily(sdxl_options(path, **options))


def assert_same(parts, models) -> None:
    pairs = [
        (parts.denoiser.state_dict(), models.denoiser.state_dict()),
        (parts.vae.state_dict(), models.vae.state_dict()),
    ]
    pairs += [(public_state(parts.text_encoders[n]), public_state(e)) for n, e in models.text_encoders.items()]
    for ours, expected in pairs:
        assert set(ours) == set(expected)
        for name, value in expected.items():
            assert torch.equal(ours[name], value), name


def test_reading_and_writing_gives_the_same_bytes(tmp_path):
    published(tmp_path / "model.safetensors")
    family = family_for(tmp_path / "model.safetensors", v_parameterization=True, zero_terminal_snr=True)
    models = family.loader.load()
    assert models.source.save_as == "safetensors"
    family.writer.save(
        models, tmp_path / "again.safetensors", save_as="safetensors", dtype=None, metadata={"format": "pt"}
    )
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_ckpt_round_trip_adds_to_the_counters(tmp_path):
    tensors = published(tmp_path / "model.safetensors")
    torch.save({"state_dict": tensors, "epoch": 2, "global_step": 300}, tmp_path / "model.ckpt")
    family = family_for(tmp_path / "model.ckpt", v_parameterization=True, zero_terminal_snr=True)
    metadata = {"ss_epoch": "3", "ss_steps": "40"}
    family.writer.save(family.loader.load(), tmp_path / "again.ckpt", save_as="ckpt", dtype=None, metadata=metadata)
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)
    assert (again["epoch"], again["global_step"]) == (5, 340)
    assert set(again["state_dict"]) == set(tensors)
    for key, value in tensors.items():
        assert again["state_dict"][key].dtype == value.dtype, key
        assert torch.equal(again["state_dict"][key], value), key


def test_trained_weights_are_what_is_written(tmp_path):
    path = write_tiny_sdxl(tmp_path / "model.safetensors", dtype=torch.float16)
    family = family_for(path)
    models = family.loader.load()
    for model in (models.denoiser, models.vae, *models.text_encoders.values()):
        for parameter in model.float().parameters():  # what is trained is made wide first
            parameter.data += 1
    models.denoiser.conv_in.weight.data += 1
    family.writer.save(
        models, tmp_path / "trained.safetensors", save_as="safetensors", dtype=torch.bfloat16, metadata={}
    )
    before, after = load_file(path), load_file(tmp_path / "trained.safetensors")
    assert set(before) == set(after)
    for key in before:  # the sum in float32, rounded once
        added = 2 if key == "model.diffusion_model.input_blocks.0.0.weight" else 1
        assert torch.equal(after[key], (before[key].float() + added).bfloat16()), key


@pytest.mark.parametrize("save_as", ["diffusers", "diffusers_safetensors"])
def test_diffusers_opens_the_folder_offline(save_as, tmp_path):
    """Its own pipeline runs one step, and the parts equal the models that were saved."""
    family = family_for(
        write_tiny_sdxl(tmp_path / "model.safetensors"), v_parameterization=True, zero_terminal_snr=True
    )
    models = family.loader.load()
    family.writer.save(models, tmp_path / "pipe", save_as=save_as, dtype=None, metadata={})
    weights = {p.suffix for p in (tmp_path / "pipe").rglob("*") if p.stat().st_size > 100_000 and "tok" not in str(p)}
    assert weights == {".bin" if save_as == "diffusers" else ".safetensors"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "pipe", local_files_only=True)
    assert type(pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.rescale_betas_zero_snr is True
    assert (pipeline.tokenizer.pad_token_id, pipeline.tokenizer_2.pad_token_id) == (49407, 0)
    out = pipeline("a red house", num_inference_steps=1, output_type="latent", height=64, width=64)
    assert torch.isfinite(out.images).all()
    assert_same(load_model(str(tmp_path / "pipe")), models)


def test_names_in_the_folder_are_those_that_older_readers_ask_for(tmp_path):
    folder = write_tiny_sdxl(tmp_path / "pipe")
    for part in ("text_encoder", "text_encoder_2"):
        names = set(load_file(folder / part / "model.safetensors"))
        assert all(name.startswith("text_model.") or name == "text_projection.weight" for name in names)
    assert "text_projection.weight" in names
    for part in ("tokenizer", "tokenizer_2"):
        assert (folder / part / "vocab.json").is_file()


def test_folder_keeps_its_scheduler_and_becomes_a_file(tmp_path):
    folder = write_tiny_sdxl(tmp_path / "folder")
    config, index = folder / "scheduler" / "scheduler_config.json", folder / "model_index.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "DDIMScheduler"}))
    index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": False}))
    family = family_for(folder)
    models = family.loader.load()
    assert models.source.save_as == "diffusers_safetensors"
    family.writer.save(models, tmp_path / "again", save_as="diffusers_safetensors", dtype=None, metadata={})
    again = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert again["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert again["force_zeros_for_empty_prompt"] is False
    family.writer.save(models, tmp_path / "file.safetensors", save_as="safetensors", dtype=None, metadata={})
    reference = load_file(write_tiny_sdxl(tmp_path / "reference.safetensors"))
    file = load_file(tmp_path / "file.safetensors")
    assert set(file) == set(reference)
    assert all(torch.equal(file[key], value) for key, value in reference.items())


def test_the_given_vae_is_in_the_saved_model_even_when_dropped(tmp_path):
    path = write_tiny_sdxl(tmp_path / "model.safetensors")
    other = write_tiny_sdxl(tmp_path / "other.safetensors", seed=5, dtype=torch.bfloat16)
    family = family_for(path, vae=str(other))
    models = family.loader.load()
    models.vae = None
    family.writer.save(models, tmp_path / "again.safetensors", save_as="safetensors", dtype=None, metadata={})
    again, model, vae = (load_file(p) for p in (tmp_path / "again.safetensors", path, other))
    for key, value in again.items():
        expected = (vae if key.startswith("first_stage_model.") else model)[key]
        assert value.dtype == expected.dtype, key
        assert torch.equal(value, expected), key
