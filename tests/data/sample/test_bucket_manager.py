"""Counting steps as the backend of a GUI does it, against what a training plans for the same images."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from library.data.config.blueprint import build_specs
from library.data.sample.dataset import build_training_data
from library.train_util import BucketManager

SIZES = [(100, 100), (200, 100), (100, 210), (333, 90), (64, 64), (100, 101), (1000, 500), (90, 70)]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "3_cat").mkdir()
    for number, size in enumerate(SIZES):
        Image.new("RGB", size, (number * 9, 80, 90)).save(tmp_path / "3_cat" / f"{number}.png")
    return tmp_path


def counted_steps(manager: BucketManager, folder: Path, repeats: int, batch_size: int) -> int:
    for file in (folder / "3_cat").iterdir():
        with Image.open(file) as image:
            reso, _, _ = manager.select_bucket(image.width, image.height)
        for _ in range(repeats):
            manager.add_image(reso, file)
    return sum(math.ceil(len(bucket) / batch_size) for bucket in manager.buckets)


@pytest.mark.parametrize("no_upscale", [False, True])
def test_steps_are_those_of_a_training(folder, make_opts, traits, no_upscale):
    manager = BucketManager(no_upscale, (256, 256), 64, 512, 64)
    if not no_upscale:
        manager.make_buckets()
    steps = counted_steps(manager, folder, repeats=3, batch_size=4)
    opts = make_opts(
        train_data_dir=str(folder),
        resolution="256",
        enable_bucket=True,
        bucket_no_upscale=no_upscale,
        min_bucket_reso=64,
        max_bucket_reso=512,
        bucket_reso_steps=64,
        train_batch_size=4,
    )
    assert steps == build_training_data(build_specs(opts, traits), opts, traits, seed=1).batches_per_epoch
    assert len(manager.buckets) == len(manager.resos) > 2


def test_one_size_without_buckets(folder):
    manager = BucketManager(False, (128, 128), None, None, None)
    manager.set_predefined_resos([(128, 128)])
    assert counted_steps(manager, folder, repeats=1, batch_size=3) == math.ceil(len(SIZES) / 3)


def test_what_is_said_of_an_image():
    manager = BucketManager(False, (128, 128), 64, 256, 64)
    manager.make_buckets()
    assert manager.select_bucket(300, 100) == ((192, 64), (192, 64), 0.0)
    reso, resized, error = manager.select_bucket(100, 90)
    assert (reso, resized) == ((128, 128), (142, 128))
    assert error == pytest.approx(1 - 100 / 90)


def test_a_tiny_image_is_named():
    with pytest.raises(ValueError, match="20x500"):
        BucketManager(True, (128, 128), 64, 256, 64).select_bucket(20, 500)
