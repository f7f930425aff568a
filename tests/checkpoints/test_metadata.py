"""The metadata of saved files: the key set, the texts, and what must not be in them."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import datetime
from types import SimpleNamespace as Group

import pytest
import torch

from library import version
from library.checkpoints import metadata as md
from library.errors import UserError

FAMILY = {
    "ss_v2": False,
    "ss_base_model_version": "sd_v1",
    "modelspec.architecture": "stable-diffusion-v1",
    "modelspec.implementation": "diffusers",
    "modelspec.prediction_type": "epsilon",
    "modelspec.resolution": "512x512",
}
METHOD = {
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "ss_network_alpha": 1.0,
    "ss_network_dropout": None,
    "ss_network_args": '{"conv_dim": "4"}',
    "ss_scale_weight_norms": None,
    "ss_unet_lr": 1e-4,
    "ss_text_encoder_lr": None,
    "ss_training_comment": None,
    "modelspec.suffix": "/lora",
}
DATA = {
    "ss_num_train_images": 20,
    "ss_num_reg_images": 0,
    "ss_num_validation_images": 0,
    "ss_num_batches_per_epoch": 10,
    "ss_dataset_dirs": {"5_cat": {"n_repeats": 5, "img_count": 4}},
    "ss_reg_dataset_dirs": {},
    "ss_tag_frequency": {"5_cat": {"cat": 4}},
    "ss_bucket_info": {"buckets": {"0": {"resolution": [512, 512], "count": 20}}, "mean_img_ar_error": 0.0},
}
FINISHED = 1700000000.25
RUN = {
    "ss_session_id": 77,
    "ss_training_started_at": 1699999000.5,
    "ss_training_finished_at": FINISHED,
    "ss_optimizer": "torch.optim.adamw.AdamW",
    "ss_max_train_steps": 100,
    "ss_num_epochs": 10,
    "ss_steps": 40,
    "ss_epoch": 4,
}


def options(**changes):
    values = {
        "saving": {"output_name": "kitten"},
        "training": {"seed": 42, "gradient_accumulation_steps": 3, "max_train_steps": 1600},
        "model": {"pretrained_model_name_or_path": "runwayml/stable-diffusion-v1-5", "vae": None},
        "memory": dict.fromkeys(["lowram", "gradient_checkpointing", "full_fp16", "fp8_base", "fp8_base_unet"], False)
        | {"mixed_precision": "bf16"},
        "optimizer": {"learning_rate": 1e-4, "lr_scheduler": "cosine", "lr_warmup_steps": 0, "max_grad_norm": 1.0},
        "noise": {
            "noise_offset": None,
            "noise_offset_random_strength": False,
            "adaptive_noise_scale": None,
            "multires_noise_iterations": None,
            "multires_noise_discount": 0.3,
            "ip_noise_gamma": None,
            "ip_noise_gamma_random_strength": False,
            "zero_terminal_snr": False,
            "min_timestep": None,
            "max_timestep": None,
        },
        "loss": {
            "min_snr_gamma": 5.0,
            "debiased_estimation_loss": True,
            "prior_loss_weight": 1.0,
            "loss_type": "l2",
            "huber_schedule": "snr",
            "huber_scale": 1.0,
            "huber_c": 0.1,
        },
        "data": {
            "of_images": True,
            "dataset_config": None,
            "cache_latents": True,
            "caption_dropout_rate": 0.0,
            "caption_dropout_every_n_epochs": 0,
            "caption_tag_dropout_rate": 0.0,
            "face_crop_aug_range": None,
            "resize_interpolation": None,
            "train_batch_size": 2,
            "color_aug": False,
            "flip_aug": True,
            "random_crop": False,
            "shuffle_caption": True,
            "resolution": "512,768",
            "enable_bucket": True,
            "bucket_no_upscale": False,
            "min_bucket_reso": 256,
            "max_bucket_reso": 1024,
            "keep_tokens": 1,
        },
        "validation": {
            "validation_seed": None,
            "validation_split": 0.0,
            "max_validation_steps": None,
            "validate_every_n_epochs": None,
            "validate_every_n_steps": None,
        },
        "family": {"clip_skip": None, "max_token_length": 225},
        "metadata": {"no_metadata": False, "metadata_title": None, "metadata_thumbnail": None}
        | {f"metadata_{name}": None for name in md._SPEC_OPTIONS},
    }
    for path, value in changes.items():
        group, _, name = path.partition("__")
        values[group][name] = value
    return Group(**{name: Group(**group) for name, group in values.items()})


def build(run=None, data=DATA, **changes):
    return md.training_metadata(options(**changes), FAMILY, METHOD, data, RUN if run is None else run)


# Written out from the format's description, for a Stable Diffusion LoRA and data folders given by options.
GOLDEN_SS = """
session_id training_started_at training_finished_at output_name training_comment sd_scripts_commit_hash seed lowram
steps epoch learning_rate text_encoder_lr unet_lr lr_scheduler lr_warmup_steps optimizer max_grad_norm max_train_steps
num_epochs gradient_accumulation_steps gradient_checkpointing mixed_precision full_fp16 fp8_base fp8_base_unet
num_train_images num_reg_images num_validation_images num_batches_per_epoch network_module network_dim network_alpha
network_dropout network_args scale_weight_norms v2 base_model_version clip_skip max_token_length cache_latents
sd_model_name noise_offset noise_offset_random_strength adaptive_noise_scale multires_noise_iterations
multires_noise_discount ip_noise_gamma ip_noise_gamma_random_strength zero_terminal_snr min_snr_gamma
debiased_estimation prior_loss_weight loss_type huber_schedule huber_scale huber_c caption_dropout_rate
caption_dropout_every_n_epochs caption_tag_dropout_rate face_crop_aug_range resize_interpolation validation_seed
validation_split max_validation_steps validate_every_n_epochs validate_every_n_steps batch_size_per_device
total_batch_size resolution color_aug flip_aug random_crop shuffle_caption enable_bucket bucket_no_upscale
min_bucket_reso max_bucket_reso keep_tokens dataset_dirs reg_dataset_dirs tag_frequency bucket_info
"""
GOLDEN_SPEC = "sai_model_spec architecture implementation title resolution date prediction_type implementation_version"


def test_nothing_is_said_of_images_where_there_are_none():
    of_images = ("ss_cache_latents", "ss_batch_size_per_device", "ss_resolution", "ss_enable_bucket")
    without = build(data={}, data__of_images=False)
    assert not without.keys() & {*of_images, "ss_validation_split", "ss_caption_dropout_rate"}
    assert {*of_images, "ss_validation_split"} <= build(data={}).keys()


def test_golden_key_set():
    expected = {f"ss_{name}" for name in GOLDEN_SS.split()} | {f"modelspec.{name}" for name in GOLDEN_SPEC.split()}
    assert set(build()) == expected


def test_key_set_with_the_real_options():
    from library.options.base import Given, build_options
    from library.registry import groups_for

    given = {"pretrained_model_name_or_path": "x/y", "resolution": "512", "output_name": "kitten"}
    opts = build_options(
        groups_for("sd", "network"), {name: Given(value, "command line") for name, value in given.items()}
    )
    assert set(md.training_metadata(opts, FAMILY, METHOD, DATA, RUN)) == set(build())


def test_values_are_texts():
    found = build()
    assert all(isinstance(value, str) for value in found.values())
    some = {
        "ss_seed": "42",
        "ss_steps": "40",
        "ss_training_finished_at": "1700000000.25",
        "ss_max_train_steps": "100",  # as planned, not as asked for
        "ss_lowram": "False",
        "ss_cache_latents": "True",
        "ss_debiased_estimation": "True",
        "ss_clip_skip": "None",
        "ss_text_encoder_lr": "None",
        "ss_unet_lr": "0.0001",
        "ss_resolution": "(512, 768)",
        "ss_batch_size_per_device": "2",
        "ss_total_batch_size": "6",
        "ss_sd_model_name": "runwayml/stable-diffusion-v1-5",
        "ss_network_args": '{"conv_dim": "4"}',
    }
    assert {key: found[key] for key in some} == some
    assert json.loads(found["ss_dataset_dirs"]) == DATA["ss_dataset_dirs"]
    assert json.loads(found["ss_bucket_info"]) == DATA["ss_bucket_info"]
    assert found["ss_reg_dataset_dirs"] == "{}"


def test_data_set_of_a_config_file_describes_itself():
    subset = {"caption_prefix": "a", "caption_suffix": None, "enable_wildcard": True}
    found = build(data={"ss_datasets": [{"is_dreambooth": True, "subsets": [subset]}]}, data__dataset_config="a.toml")
    assert json.loads(found["ss_datasets"])[0]["subsets"] == [subset]
    assert not {"ss_batch_size_per_device", "ss_resolution", "ss_enable_bucket", "ss_keep_tokens"} & set(found)


def test_total_batch_size_counts_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert build()["ss_total_batch_size"] == "24"


def test_modelspec_values():
    found = {key.removeprefix("modelspec."): value for key, value in build().items() if key.startswith("modelspec.")}
    assert found == {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-v1/lora",
        "implementation": "diffusers",
        "title": "kitten",
        "resolution": "512x768",
        "date": datetime.fromtimestamp(1700000000).isoformat(),
        "prediction_type": "epsilon",
        "implementation_version": "trainscripts/0.1.0",
    }


@pytest.mark.parametrize(("resolution", "expected"), [(None, "512x512"), ("640", "640x640"), ("640, 448", "640x448")])
def test_modelspec_resolution(resolution, expected):
    assert build(data__resolution=resolution)["modelspec.resolution"] == expected


@pytest.mark.parametrize(("low", "high", "text"), [(100, None, "100,1000"), (None, 900, "0,900"), (0, 500, "0,500")])
def test_modelspec_timestep_range(low, high, text):
    assert build(noise__min_timestep=low, noise__max_timestep=high)["modelspec.timestep_range"] == text


def test_modelspec_from_options():
    found = build(
        metadata__metadata_title="My cat",
        metadata__metadata_author="me",
        metadata__metadata_is_negative_embedding="no",
        family__clip_skip=2,
    )
    assert found["modelspec.title"] == "My cat"
    assert found["modelspec.author"] == "me"
    assert found["modelspec.is_negative_embedding"] == "no"
    assert found["modelspec.encoder_layer"] == found["ss_clip_skip"] == "2"
    assert build(saving__output_name=None)["modelspec.title"] == f"LoRA@{FINISHED}"


def test_modelspec_of_an_embedding_and_of_a_file_that_no_run_made():
    facts = {**FAMILY, "modelspec.suffix": "/textual-inversion"}
    found = md.with_modelspec({}, options(), facts)
    assert found["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert found["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    assert abs(datetime.now() - datetime.fromisoformat(found["modelspec.date"])).total_seconds() < 60


def test_thumbnail_becomes_a_data_url(tmp_path):
    image = tmp_path / "t.PNG"
    image.write_bytes(b"\x89PNG bytes")
    url = build(metadata__metadata_thumbnail=str(image))["modelspec.thumbnail"]
    kind, _, content = url.partition(",")
    assert (kind, base64.b64decode(content)) == ("data:image/png;base64", b"\x89PNG bytes")
    assert md.data_url(url) == url
    (tmp_path / "t.txt").write_bytes(b"a text")
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate((16 << 20) + 1)
    for wrong, problem in (
        ("none.jpg", "[Nn]o such file"),
        ("t.txt", "is not named .png"),
        ("large.png", "16,777,217"),
    ):
        with pytest.raises(UserError, match=rf"--metadata_thumbnail: .*{wrong}: .*{problem}"):
            md.data_url(str(tmp_path / wrong))


def test_base_model_files_are_named_and_hashed_without_their_folders(tmp_path):
    model, vae = tmp_path / "private" / "model.ckpt", tmp_path / "private" / "vae.pt"
    model.parent.mkdir()
    model.write_bytes(b"m" * 2_000_000)
    vae.write_bytes(b"v" * 10)
    found = build(model__pretrained_model_name_or_path=str(model), model__vae=str(vae))
    assert found["ss_sd_model_name"] == "model.ckpt"
    assert found["ss_sd_model_hash"] == hashlib.sha256(b"m" * 65536).hexdigest()[:8]
    assert found["ss_new_sd_model_hash"] == hashlib.sha256(b"m" * 2_000_000).hexdigest()
    assert (found["ss_vae_name"], found["ss_vae_hash"]) == ("vae.pt", "e3b0c442")
    assert found["ss_new_vae_hash"] == hashlib.sha256(b"v" * 10).hexdigest()
    assert not any("private" in value for value in found.values())
    folder = build(model__pretrained_model_name_or_path=str(model.parent) + "/")
    assert (folder["ss_sd_model_name"], folder["ss_sd_model_hash"]) == ("private", "IsADirectory")


def test_no_metadata_keeps_the_minimum():
    found = md.finalise(build(metadata__no_metadata=True), {"k.alpha": torch.tensor(1.0)})
    kept = {"v2", "base_model_version", "network_module", "network_dim", "network_alpha", "network_args"}
    assert {key for key in found if key.startswith("ss_")} == {f"ss_{name}" for name in kept}
    assert {key for key in found if key.startswith("modelspec.")} == {
        f"modelspec.{name}" for name in GOLDEN_SPEC.split()
    }
    assert {key for key in found if key.startswith("sshs_")} == {"sshs_model_hash", "sshs_legacy_hash"}


def test_finalise_twice_changes_nothing():
    tensors = {"k.weight": torch.randn(600, 600)}
    once = md.finalise(build(), tensors)
    assert md.finalise(once, tensors) == once
    assert once["sshs_legacy_hash"] != "e3b0c442"


def test_version_names_us_and_the_commit():
    assert (version.NAME, version.VERSION) == ("trainscripts", "0.1.0")
    commit = build()["ss_sd_scripts_commit_hash"]
    assert commit == "(unknown)" or (len(commit) == 40 and int(commit, 16) >= 0)
