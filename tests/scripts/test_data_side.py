"""The data side as a user meets it: latents on disk, masks, validation, metadata files, contact sheets, processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library import cli
from library.data.sample import images
from library.runtime import seeds
from library.types import Size


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of five images, so that files may be written beside them."""
    folder = tmp_path_factory.mktemp("data") / "train" / "2_sks flower"
    folder.mkdir(parents=True)
    for path in sorted(Path("examples/concept/10_sks flower").glob("*.png"))[:5]:
        shutil.copy(path, folder)
        shutil.copy(path.with_suffix(".caption"), folder)
    return folder.parent


@pytest.fixture(scope="module")
def train(run_script, train_arguments, tmp_path_factory):
    """Runs train_network.py and gives (what it printed, the weights it wrote)."""

    def run(processes=1, **changes):
        out = tmp_path_factory.mktemp("out")
        done = run_script(*train_arguments(out, **{"max_train_steps": 3, **changes}), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr, out / "lora.safetensors"

    return run


def weights_hash(path):
    with safe_open(path, "pt") as file:
        return file.metadata()["sshs_model_hash"]


@pytest.fixture(scope="module")
def first(train, place):
    """A run that writes the latents; the others start from there."""
    return train(train_data_dir=place, cache_latents=None, cache_latents_to_disk=True, flip_aug=True)


@pytest.mark.rows("R13", "R104")
def test_latents_on_disk_are_those_of_the_vae_itself(first, place, small_model):
    _, models = cli.load_family("sd", [f"--pretrained_model_name_or_path={small_model}"])
    files = sorted(place.glob("*/*.npz"))
    assert len(files) == 5
    for file in files:
        with np.load(file) as arrays:
            stem, size, _ = file.stem.rsplit("_", 2)
            image = file.with_name(f"{stem}.png")
            width, height = Image.open(image).size
            assert size == f"{width:04d}x{height:04d}"
            assert arrays["original_size_8x8"].tolist() == [width, height]
            assert arrays["crop_ltrb_8x8"].tolist() == [0, 0, 64, 64]
            pixels = images.to_pixels(images.resize(images.read_image(image), Size(64, 64)))[None]
            for name, seen, look in (
                ("latents_8x8", pixels, "plain"),
                ("latents_flipped_8x8", pixels.flip(-1), "flipped"),
            ):
                with torch.no_grad():
                    posterior = models.vae.encode(seen).latent_dist
                rng = seeds.generator("cpu", 1, "latents", image.name, 64, 64, look)
                expected = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng)
                assert arrays[name].dtype == np.float32
                assert np.allclose(arrays[name], expected[0].numpy(), atol=1e-5)


def test_memory_disk_and_the_next_start_train_the_same(first, train, place):
    written, from_disk = first
    assert "latents on disk: 5 new\n" in written
    again, second = train(train_data_dir=place, cache_latents=None, cache_latents_to_disk=True, flip_aug=True)
    assert "latents on disk: 5 used as they are\n" in again
    _, in_memory = train(train_data_dir=place, flip_aug=True)
    assert weights_hash(from_disk) == weights_hash(second) == weights_hash(in_memory)


@pytest.mark.rows("R221")
def test_training_from_metadata_and_latents_alone(first, train, place, tmp_path):
    folder = tmp_path / "latents"
    folder.mkdir()
    for file in place.glob("*/*.npz"):
        shutil.copy(file, folder)
    entries = {file.stem.rsplit("_", 2)[0]: {"caption": "a flower", "tags": "pink"} for file in folder.iterdir()}
    (tmp_path / "meta_lat.json").write_text(json.dumps(entries))
    printed, weights = train(
        train_data_dir=folder, in_json=tmp_path / "meta_lat.json", cache_latents=None, shuffle_caption=True
    )
    assert "5 images of which only latents are there" in printed
    assert "5 used as they are" in printed
    assert any(value.any() for name, value in load_file(weights).items() if "lora_up" in name)


def test_two_processes_share_the_work_and_agree(train, place, tmp_path):
    shutil.copytree(place, tmp_path / "train")
    for file in (tmp_path / "train").glob("*/*.npz"):
        file.unlink()
    options = {"train_data_dir": tmp_path / "train", "flip_aug": True}
    printed, on_disk = train(2, cache_latents=None, cache_latents_to_disk=True, **options)
    assert "5 new" in printed
    assert len(list((tmp_path / "train").glob("*/*.npz"))) == 5
    for ours, alone in zip(sorted((tmp_path / "train").glob("*/*.npz")), sorted(place.glob("*/*.npz")), strict=True):
        with np.load(ours) as left, np.load(alone) as right:
            assert np.allclose(left["latents_8x8"], right["latents_8x8"], atol=1e-5)
    _, in_memory = train(2, **options)
    left, right = load_file(on_disk), load_file(in_memory)
    assert all(torch.allclose(left[name], right[name], atol=1e-5) for name in left)


@pytest.mark.rows("R267", "R270")
def test_what_is_black_in_a_mask_teaches_nothing(train, place, tmp_path):
    masks = tmp_path / "masks" / "2_sks flower"
    masks.mkdir(parents=True)
    for path in place.glob("*/*.png"):
        Image.new("RGB", Image.open(path).size, "black").save(masks / path.name)
    options = {"conditioning_data_dir": tmp_path / "masks", "masked_loss": True, "validation_split": 0.2}
    printed, weights = train(train_data_dir=place, validate_every_n_steps=1, **options)
    assert printed.count("validation loss 0.00000") == 3
    assert "held out for validation: 1 images" in printed
    assert not any(value.any() for name, value in load_file(weights).items() if "lora_up" in name)
    with safe_open(weights, "pt") as file:
        assert file.metadata()["ss_num_validation_images"] == "1"


def test_the_validation_loss_is_the_same_for_the_same_weights(train, place):
    """Noise and timesteps are fixed: with a rate of nothing, nothing changes."""
    options = {"learning_rate": 1e-12, "validation_split": 0.4, "validate_every_n_steps": 1, "network_dropout": 0.5}
    printed, _ = train(train_data_dir=place, **options)
    losses = [
        line.split("validation loss ")[1].split()[0] for line in printed.splitlines() if "validation loss" in line
    ]
    assert len(losses) == 3
    assert len(set(losses)) == 1
    assert float(losses[0]) > 0


@pytest.mark.rows("R220")
def test_a_look_at_the_data_set(run_script, train_arguments, place, tmp_path):
    done = run_script(*train_arguments(tmp_path, train_data_dir=place, debug_dataset=True))
    assert done.returncode == 0, done.stderr[-2000:]
    sheets = sorted((tmp_path / "debug_dataset").iterdir())
    assert [sheet.name for sheet in sheets] == ["dataset1_bucket0064x0064_page1.png"]
    assert Image.open(sheets[0]).size > (200, 100)
    assert not (tmp_path / "lora.safetensors").exists()


def test_a_data_set_of_ones_own(run_script, train_arguments, place, tmp_path):
    arguments = train_arguments(tmp_path, train_data_dir=place, dataset_class="tests.scripts.own_data.build")
    done = run_script(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert "mine:" in file.metadata()["ss_tag_frequency"]
    done = run_script(*train_arguments(tmp_path, train_data_dir=place, dataset_class="tests.no_such.build"))
    assert done.returncode == 2
    assert "--dataset_class: tests.no_such.build cannot be imported" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_strict_run_ends_at_a_broken_image(run_script, train_arguments, place, tmp_path):
    shutil.copytree(place, tmp_path / "train")
    broken = tmp_path / "train" / "2_sks flower" / "flower_00.png"
    broken.write_bytes(broken.read_bytes()[:200])
    arguments = train_arguments(tmp_path, train_data_dir=tmp_path / "train", strict=True)
    done = run_script(*arguments)
    assert done.returncode == 2
    assert "flower_00.png" in done.stderr
    assert "Traceback" not in done.stderr
