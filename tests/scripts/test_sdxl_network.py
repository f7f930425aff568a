"""sdxl_train_network.py from the outside, on a tiny random model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library import cli
from library.data.sample import images as imaging
from library.types import Size
from tests.builders.sdxl import write_tiny_sdxl
from tests.scripts.weights import furthest, hash_of

DIMS = ",".join(["4"] * 11 + ["6"] + ["4"] * 11)  # the middle's transformers get another rank


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny-xl.safetensors")


@pytest.fixture(scope="module")
def command(model, train_arguments):
    def build(out: Path, **changes: object) -> list[str]:
        line = train_arguments(out, **{"pretrained_model_name_or_path": model} | changes)
        return ["sdxl_train_network.py", *line[1:]]

    return build


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_script, command) -> SimpleNamespace:
    """Cached latents, both text encoders, block-wise ranks, a sample image."""
    out = tmp_path_factory.mktemp("trained")
    prompts = out / "prompts.txt"
    prompts.write_text("a sks flower --n blue --w 64 --h 128 --s 2 --d 7\n", encoding="utf-8")
    line = command(
        out,
        max_train_steps=3,
        bucket_reso_steps=32,
        max_token_length=150,
        network_args=[f"block_dims={DIMS}"],
        network_alpha=2,
        save_every_n_steps=2,
        sample_prompts=prompts,
        sample_every_n_steps=3,
        clip_skip=2,
        disable_mmap_load_safetensors=True,
        v_parameterization=True,
        zero_terminal_snr=True,
    )
    result = run_script(*line)
    assert result.returncode == 0, result.stderr
    with safe_open(out / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    return SimpleNamespace(out=out, result=result, weights=load_file(out / "lora.safetensors"), metadata=metadata)


def test_files_and_images(trained):
    names = sorted(path.name for path in trained.out.glob("*.safetensors"))
    assert names == ["lora-step00000002.safetensors", "lora.safetensors"]
    (image,) = (trained.out / "sample").iterdir()
    with Image.open(image) as image:
        assert image.size == (64, 128)


def test_keys_are_those_of_the_format(trained):
    """The tiny model: 3 + 3 text layers, transformers at the second and third level."""
    layers = {key.partition(".")[0] for key in trained.weights}
    assert {key.partition(".")[2] for key in trained.weights} == {"lora_down.weight", "lora_up.weight", "alpha"}
    for encoder in ("te1", "te2"):
        assert len([layer for layer in layers if layer.startswith(f"lora_{encoder}_text_model_encoder_layers_")]) == 18
    unet = {layer for layer in layers if layer.startswith("lora_unet_")}
    assert len(layers) == 36 + len(unet)
    places = {re.match(r"lora_unet_([a-z]+_blocks?_\d+)", layer)[1] for layer in unet}
    assert places == {
        *(f"input_blocks_{n}" for n in (4, 5, 7, 8)),
        "middle_block_1",
        *(f"output_blocks_{n}" for n in range(6)),
    }
    for layer in (
        "input_blocks_4_1_proj_in",
        "middle_block_1_transformer_blocks_1_attn2_to_k",
        "output_blocks_0_1_proj_out",
    ):
        assert f"lora_unet_{layer}" in unet


@pytest.mark.rows("R294")
def test_block_wise_ranks_reach_the_file(trained):
    for key, value in trained.weights.items():
        if key.endswith("lora_down.weight"):
            assert value.shape[0] == (6 if "middle_block_1" in key else 4), key
    assert any(value.abs().max() > 0 for key, value in trained.weights.items() if "lora_up" in key)
    assert all(torch.isfinite(value).all() for value in trained.weights.values())


def test_both_text_encoders_and_the_unet_learn(trained):
    for part in ("lora_te1_", "lora_te2_", "lora_unet_"):
        moved = [v.abs().max() > 0 for k, v in trained.weights.items() if k.startswith(part) and "lora_up" in k]
        assert any(moved), part


def test_metadata(trained):
    expected = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_max_token_length": "150",
        "ss_sd_model_name": "tiny-xl.safetensors",
        "ss_zero_terminal_snr": "True",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "v",
        "modelspec.resolution": "64x64",
    }
    assert {name: trained.metadata.get(name) for name in expected} == expected
    assert json.loads(trained.metadata["ss_network_args"])["block_dims"] == DIMS


def test_what_has_no_effect_is_reported(trained):
    assert "--clip_skip: has no effect on SDXL" in trained.result.stderr
    assert "Traceback" not in trained.result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"network_args": ["block_dims=" + ",".join(["4"] * 25)]},
            "block_dims=4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4: has 25 entries, this model has 23 blocks",
        ),
        (
            {"cache_text_encoder_outputs": True, "shuffle_caption": True, "network_train_unet_only": True},
            "shuffle_caption changes the caption during training, so text encoder outputs cannot be cached",
        ),
        (
            {"cache_text_encoder_outputs_to_disk": True},
            "text encoders whose outputs are cached cannot be trained; add --network_train_unet_only",
        ),
    ],
)
def test_mistakes_are_one_line_before_anything_is_loaded(tmp_path, run_script, command, options, said):
    result = run_script(*command(tmp_path, **options))
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert said in line


# ---- outputs of text encoders and VAE in files


@pytest.fixture(scope="module")
def still_model(model, tmp_path_factory) -> Path:
    """The model with a VAE that hardly draws its latents by chance, as real ones."""
    weights = load_file(model)
    weights["first_stage_model.quant_conv.weight"][4:] = 0
    weights["first_stage_model.quant_conv.bias"][4:] = -30
    path = tmp_path_factory.mktemp("still") / "still-xl.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two square images and two wide ones, each with a caption of its own."""
    folder = tmp_path_factory.mktemp("images") / "2_sks flower"
    folder.mkdir()
    for number, path in enumerate(sorted(Path("examples/concept/10_sks flower").glob("*.png"))[:4]):
        with Image.open(path) as image:
            image.resize((64, 64) if number < 2 else (192, 64)).save(folder / path.name)
        folder.joinpath(path.stem + ".caption").write_text(f"a sks flower, number {number}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def plan(command, still_model, images, trained):
    """Goes on with the trained file, from the middle to the output. Steps follow the gradients, however small."""

    def build(out: Path, **changes: object) -> list[str]:
        options = {
            "pretrained_model_name_or_path": still_model,
            "train_data_dir": images.parent,
            "min_bucket_reso": 32,
            "bucket_reso_steps": 32,
            "flip_aug": True,
            "network_weights": trained.out / "lora.safetensors",
            "dim_from_weights": True,
            "network_train_unet_only": True,
            "network_args": ["down_lr_weight=zeros", "mid_lr_weight=1,1,1", "up_lr_weight=2,2,2,2,2,2,2,2,2"],
            "gradient_accumulation_steps": 2,
            "max_train_steps": 3,
            "optimizer_type": "SGD",
            "learning_rate": 1,
            "cache_latents": None,
        }
        return command(out, **options | changes)

    return build


FILES = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
SAMPLES = {"sample_every_n_steps": 2}


@pytest.fixture(scope="module")
def from_files(tmp_path_factory, run_script, plan) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("from_files")
    prompts = out / "prompts.txt"
    prompts.write_text("a sks flower --n blue --w 64 --h 64 --s 2 --d 7\n", encoding="utf-8")
    result = run_script(*plan(out, **FILES, **SAMPLES, sample_prompts=prompts, save_every_n_steps=2, save_state=True))
    assert result.returncode == 0, result.stderr[-3000:]
    return SimpleNamespace(
        out=out,
        prompts=prompts,
        weights=load_file(out / "lora.safetensors"),
        model_hash=hash_of(out / "lora.safetensors"),
    )


def test_files_are_those_of_the_formats(from_files, images, still_model):
    names = [f"flower_{n:02}{end}" for n in range(4) for end in ((SQUARE, WIDE)[n > 1], "_te_outputs.npz")]
    assert sorted(path.name for path in images.glob("*.npz")) == names
    family, models = cli.load_family("sdxl", [f"--pretrained_model_name_or_path={still_model}"])
    for number in range(4):
        size = Size(96, 32) if number > 1 else Size(64, 64)
        image = imaging.read_image(images / f"flower_{number:02}.png")
        pixels = imaging.to_pixels(imaging.resize(image, size))
        with np.load(images / names[2 * number]) as file:
            shape = f"{size.height // 8}x{size.width // 8}"
            kinds = ("latents", "latents_flipped", "original_size", "crop_ltrb", "provenance")
            assert set(file) == {f"{kind}_{shape}" for kind in kinds}
            assert file[f"latents_{shape}"].dtype == np.float32
            assert file[f"latents_{shape}"].shape == (4, size.height // 8, size.width // 8)
            assert file[f"original_size_{shape}"].tolist() == [image.shape[1], image.shape[0]]
            for kind, view in (("latents", pixels), ("latents_flipped", pixels.flip(-1))):
                with torch.no_grad():
                    mean = models.vae.encode(view[None]).latent_dist.mean[0]  # as it comes, not scaled
                assert np.abs(file[f"{kind}_{shape}"] - mean.numpy()).max() < 1e-4, kind
        with np.load(images / names[2 * number + 1]) as file, torch.no_grad():
            cond = family.text.encode(models, [f"a sks flower, number {number}"]).tensors
            assert set(file) == {"hidden_state1", "hidden_state2", "pool2", "provenance"}
            for key, width in (("hidden_state1", (77, 64)), ("hidden_state2", (77, 128)), ("pool2", (64,))):
                assert (file[key].shape, file[key].dtype) == (width, np.float32)
                assert np.abs(file[key] - cond[key][0].numpy()).max() < 1e-4, key


SQUARE, WIDE = "_0064x0064_sdxl.npz", "_0192x0064_sdxl.npz"  # the image's size, not the bucket's


@pytest.mark.rows("R294")
def test_block_wise_rates_and_the_denoiser_only(from_files, trained):
    """What is not trained is not in the file; down-blocks have no rate."""
    assert from_files.weights.keys() == {key for key in trained.weights if key.startswith("lora_unet_")}
    moved = {key for key, value in from_files.weights.items() if not torch.equal(value, trained.weights[key])}
    places = {re.match(r"lora_unet_([a-z]+_block)", key)[1] for key in moved}
    assert places == {"middle_block", "output_block"}


@pytest.mark.rows("R147", "R152")
def test_resumed_from_a_state_and_the_files_it_is_the_same_model(from_files, run_script, plan, tmp_path):
    result = run_script(*plan(tmp_path, **FILES, resume=from_files.out / "lora-step00000002-state"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "latents on disk: 4 used as they are\n" in result.stderr
    assert "caching text encoder outputs" not in result.stderr
    assert hash_of(tmp_path / "lora.safetensors") == from_files.model_hash
    assert furthest(load_file(tmp_path / "lora.safetensors"), from_files.weights) == 0


def test_two_processes_give_the_same_model_as_one_that_accumulates(from_files, run_script, plan, tmp_path):
    result = run_script(*plan(tmp_path, **FILES, gradient_accumulation_steps=1), processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert furthest(load_file(tmp_path / "lora.safetensors"), from_files.weights) < 1e-6


def test_without_files_it_is_the_same_model_and_the_same_image(from_files, run_script, plan, tmp_path, trained):
    """Equal but for rounding: captions are encoded in other groups. The weights have moved 10,000 times as far."""
    result = run_script(*plan(tmp_path, **SAMPLES, sample_prompts=from_files.prompts))
    assert result.returncode == 0, result.stderr[-3000:]
    before = {key: trained.weights[key] for key in from_files.weights}
    assert furthest(from_files.weights, before) > 1e-3
    assert furthest(load_file(tmp_path / "lora.safetensors"), from_files.weights) < 1e-7
    (cached,), (fresh,) = ((out / "sample").iterdir() for out in (from_files.out, tmp_path))
    with Image.open(cached) as one, Image.open(fresh) as other:
        assert one.size == (64, 64)
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1
