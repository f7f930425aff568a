"""Latents in memory: the right picture, bucket and mirror image for every record."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from library.caching.latents import cache_latents_in_memory
from library.data.blueprint import build_specs
from library.data.dataset import build_training_data
from library.errors import UserError
from library.families.base import FamilyTraits
from library.options.base import Given, build_options
from library.options.data import DataOptions
from library.options.loss import LossOptions
from library.options.training import TrainingOptions

TRAITS = FamilyTraits("Test family", ("te",), 3, 8, 64, "ddpm", "_test.npz", 512, 1, 1.0)


def encode(pixels):
    """Stands for a VAE: the mean of every 8x8 block, so that latents tell where each colour was."""
    return torch.nn.functional.avg_pool2d(pixels, 8)


class Bar:
    """Counts as tqdm does."""

    def __init__(self, total, desc, unit):
        self.total, self.unit, self.done = total, unit, 0

    def update(self, count):
        self.done += count

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture
def load(tmp_path):
    """TrainingData of dataset tables."""

    def build(*datasets, workers=0):
        general = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 256}
        file = tmp_path / "data.json"
        file.write_text(json.dumps({"general": general, "datasets": list(datasets)}))
        given = {"dataset_config": file, "cache_latents": True, "max_data_loader_n_workers": workers}
        groups = (DataOptions, LossOptions, TrainingOptions)
        opts = build_options(groups, {name: Given(value, "command line") for name, value in given.items()})
        return build_training_data(build_specs(opts, TRAITS), opts, TRAITS, 1)

    return build


@pytest.fixture
def folder(tmp_path):
    """Pictures of two shapes; smooth, and each of its own."""
    path = tmp_path / "pictures"
    path.mkdir()
    for number, (width, height) in enumerate([(128, 128), (150, 140), (130, 128), (384, 128), (390, 130)]):
        y, x = np.mgrid[0:height, 0:width]
        array = np.stack([x * 255 / width, y * 255 / height, np.full_like(x, 50 * number)], axis=-1)
        Image.fromarray(array.astype(np.uint8)).save(path / f"{number}.png")
    return path


def table(folder, side=128, **subset):
    return {"resolution": side, "batch_size": 2, "subsets": [{"image_dir": str(folder), "class_tokens": "x", **subset}]}


@pytest.mark.rows("R180", "R181")
def test_cached_batches_equal_encoded_ones(folder, load):
    tables = [table(folder, 128, flip_aug=True, num_repeats=2), table(folder, 64)]
    plain, cached = load(*tables), load(*tables)
    sizes = []

    def watched(pixels):
        assert not torch.is_grad_enabled()
        sizes.append(tuple(pixels.shape))
        return encode(pixels)

    bars = []
    cache_latents_in_memory(cached, watched, 3, lambda **kwargs: bars.append(Bar(**kwargs)) or bars[-1])
    for epoch in (1, 2):
        for left, right in zip(plain.loader(epoch), cached.loader(epoch), strict=True):
            assert right.pixels is None
            assert torch.allclose(encode(left.pixels), right.latents, atol=1e-6)  # float32 sums in another batch
            assert left.captions == right.captions
            assert torch.equal(left.crop_top_lefts, right.crop_top_lefts)
    # 5 pictures and their mirror images at 128, 5 at 64; batches are full but for each size's last.
    assert (bars[0].total, bars[0].done, bars[0].unit) == (15, 15, "img")
    assert sum(shape[0] for shape in sizes) == 15
    assert sorted(shape[0] for shape in sizes if shape[2:] == (128, 128)) == [3, 3]
    assert {shape[2:] for shape in sizes} == {(128, 128), (64, 192), (64, 64)}


@pytest.mark.rows("R253")
def test_each_subset_keeps_its_own_flip(folder, load, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (128, 128), "red").save(other / "red.png")
    tables = table(folder, flip_aug=True)
    tables["subsets"].append({"image_dir": str(other), "class_tokens": "x"})
    data = load(tables)
    cache_latents_in_memory(data, encode, 4, Bar)
    for record, latents in zip(data.records, data.items.latents, strict=True):
        assert (latents.flipped is not None) == (record.path.name != "red.png")
        if latents.flipped is not None:  # encoded from mirrored pixels; the stand-in's latents mirror exactly
            assert torch.allclose(latents.flipped, latents.plain.flip(-1), atol=1e-6)


def test_a_folder_used_twice_is_encoded_once(folder, load):
    data = load(table(folder), table(folder, num_repeats=3))
    count = []
    cache_latents_in_memory(data, lambda pixels: count.append(len(pixels)) or encode(pixels), 2, Bar)
    assert sum(count) == 5
    assert len(data.records) == 10


def test_no_workers_are_started_for_cached_latents(folder, load):
    data = load(table(folder), workers=2)
    assert data.loader(1).num_workers > 0
    cache_latents_in_memory(data, encode, 2, Bar)
    assert data.loader(1).num_workers == 0


def test_nan_names_the_picture(folder, load):
    data = load(table(folder))

    def broken(pixels):
        latents = encode(pixels)
        latents[-1, 0, 0, 0] = float("nan")
        return latents

    with pytest.raises(UserError, match=r"[0-4]\.png: the VAE gives NaN"):
        cache_latents_in_memory(data, broken, 2, Bar)


def test_a_damaged_picture_is_named_and_no_thread_is_left(folder, load):
    data = load(table(folder))
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:300])
    before = threading.active_count()
    with pytest.raises(UserError, match=r"1\.png: the picture cannot be read"):
        cache_latents_in_memory(data, encode, 2, Bar)
    assert threading.active_count() == before


def test_the_default_progress_bar_counts_pictures(folder, load, capsys):
    cache_latents_in_memory(load(table(folder)), encode, 2)
    assert "caching latents" in capsys.readouterr().err
