"""prepare_buckets_latents.py from the outside, and training on what it leaves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

SCRIPT = "finetune/prepare_buckets_latents.py"
BUCKETS = ("--min_bucket_reso=64", "--max_bucket_reso=128")


@pytest.fixture
def images(tmp_path):
    """A folder of three images of different shapes, and a damaged one; and their captions in a metadata file."""
    folder = tmp_path / "train_data"
    folder.mkdir()
    for number, size in enumerate(((64, 64), (150, 70), (75, 140))):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    metadata = {str(number): {"caption": f"image {number}", "tags": "one, two"} for number in range(3)}
    (tmp_path / "meta_clean.json").write_text(json.dumps(metadata))
    return folder


def ran(run_script, *arguments, **how):
    done = run_script(*map(str, arguments), **how)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.rows("C20", "C21", "R102", "R108")
def test_training_from_latents_alone_is_training_from_the_images(run_script, small_model, images, tmp_path):
    """The same weights, to the last bit, so the same losses: whether images are there or what was made of them."""
    (images / "damaged.png").write_bytes((images / "1.png").read_bytes()[:500])
    printed = ran(
        run_script,
        *(SCRIPT, images, tmp_path / "meta_clean.json", tmp_path / "meta_lat.json", small_model, "--batch_size", "4"),
        *("--max_resolution", "128,64", "--mixed_precision", "no", "--flip_aug", "--seed=3", *BUCKETS),
    )
    assert "damaged.png" in printed
    assert "3 done, 1 failed" in printed
    (images / "damaged.png").unlink()
    alone, apart = tmp_path / "latents", tmp_path / "images"
    shutil.copytree(images, alone, ignore=shutil.ignore_patterns("*.png"))
    shutil.copytree(images, apart, ignore=shutil.ignore_patterns("*.npz"))
    common = (
        *(
            "fine_tune.py",
            f"--pretrained_model_name_or_path={small_model}",
            "--max_train_steps=3",
            "--learning_rate=1e-3",
        ),
        *("--seed=3", "--max_data_loader_n_workers=0", "--save_model_as=safetensors", "--mixed_precision=no"),
    )
    lost = ran(
        run_script,
        *(*common, f"--in_json={tmp_path}/meta_lat.json", f"--train_data_dir={alone}"),
        f"--output_dir={tmp_path}/lost",
    )
    assert "3 images of which only latents are there" in lost
    assert "latents on disk: 3 used as they are\n" in lost
    there = ran(
        run_script,
        *(*common, f"--in_json={tmp_path}/meta_clean.json", f"--train_data_dir={apart}", "--resolution=128,64"),
        *("--enable_bucket", *BUCKETS, "--cache_latents_to_disk", "--flip_aug", f"--output_dir={tmp_path}/there"),
    )
    assert "latents on disk: 3 new\n" in there
    first, second = (load_file(tmp_path / name / "last.safetensors") for name in ("lost", "there"))
    before = load_file(small_model)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], before[name]) for name in first)


def test_training_with_the_images_still_there_follows_the_metadata_file(run_script, small_model, images, tmp_path):
    """As the guides have it: without a word about sizes. Two processes have shared the work before."""
    out = tmp_path / "meta_lat.json"
    arguments = (images, tmp_path / "meta_clean.json", out, small_model, "--max_resolution=128,64", *BUCKETS)
    printed = ran(run_script, SCRIPT, *arguments, processes=2)
    assert "3 done" in printed
    assert "2/2" in printed, "the first of them encodes two"
    assert [entry["train_resolution"] for entry in json.loads(out.read_text()).values()] == [
        [64, 64], [128, 64], [64, 128],
    ]  # fmt: skip
    trained = ran(
        run_script,
        *("fine_tune.py", f"--pretrained_model_name_or_path={small_model}", f"--in_json={out}"),
        *(f"--train_data_dir={images}", f"--output_dir={tmp_path}/out", "--max_train_steps=1", "--seed=1"),
    )
    assert "latents on disk: 3 used as they are\n" in trained


def test_it_starts_from_inside_its_folder_and_help_imports_nothing_heavy():
    line = [sys.executable, "-X", "importtime", "prepare_buckets_latents.py", "--help"]
    folder = Path(__file__).parents[2] / "finetune"
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--bucket_no_upscale" in done.stdout
    assert "| torch" not in done.stderr
