"""Latents in memory and on disk: the right image, bucket, mirror image and mask for every record."""

from __future__ import annotations

import json
import logging
import os
import threading
from itertools import chain
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from library.caching import latents
from library.caching.encode_missing import Encoder
from library.data.config.blueprint import build_specs
from library.data.sample import buckets, images
from library.data.sample.dataset import build_training_data
from library.data.sample.rendering import render
from library.errors import UserError
from library.types import CacheLayout, FamilyTraits
from tests.builders.options import options_for

TRAITS = FamilyTraits("Test family", ("te",), 3, 8, 64, "ddpm", "_test.npz", 512, 1, 1.0)


LAYOUT = CacheLayout("_test.npz", 3, keys_by_size=False)


def encode(pixels, rngs=None):
    """Stands for a VAE: the mean of every 8x8 block, so that latents tell where each colour was."""
    return torch.nn.functional.avg_pool2d(pixels, 8)


class Counted:
    """Remembers the shapes that it encoded."""

    def __init__(self):
        self.shapes = []

    def __call__(self, pixels, rngs):
        assert not torch.is_grad_enabled()
        assert len(rngs) == len(pixels)
        self.shapes.append(tuple(pixels.shape))
        return encode(pixels)

    @property
    def images(self):
        return sum(shape[0] for shape in self.shapes)


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

    def build(*datasets, workers=0, image_role="mask"):
        general = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 256}
        file = tmp_path / "data.json"
        file.write_text(json.dumps({"general": general, "datasets": list(datasets)}))
        masked = any("conditioning_data_dir" in subset for dataset in datasets for subset in dataset["subsets"])
        given = {"dataset_config": file, "cache_latents": True, "max_data_loader_n_workers": workers}
        given |= {"masked_loss": masked and image_role == "mask", "data_index_dir": str(tmp_path / "index")}
        opts = options_for("sd", "network", **given)
        return build_training_data(build_specs(opts, TRAITS, image_role), opts, TRAITS, 1)

    return build


@pytest.fixture
def folder(tmp_path):
    """Images of two shapes; smooth, and each of its own."""
    path = tmp_path / "images"
    path.mkdir()
    for number, (width, height) in enumerate([(128, 128), (150, 140), (130, 128), (384, 128), (390, 130)]):
        y, x = np.mgrid[0:height, 0:width]
        array = np.stack([x * 255 / width, y * 255 / height, np.full_like(x, 50 * number)], axis=-1)
        Image.fromarray(array.astype(np.uint8)).save(path / f"{number}.png")
    return path


def table(folder, side=128, **subset):
    return {"resolution": side, "batch_size": 2, "subsets": [{"image_dir": str(folder), "class_tokens": "x", **subset}]}


def encoder(watched=encode, batch_size=3, **more):
    return Encoder(watched, batch_size, seed=1, **more)


def in_memory(data, chosen=None):
    data.set_latents(latents.cache_in_memory(data.all_records, chosen or encoder(), LAYOUT), in_memory=True)


def on_disk(data, watched=encode, vae="vae 1", chosen=None, **more):
    """Returns: how many records had latents that fit."""
    result = latents.cache_on_disk(data.all_records, data.index, chosen or encoder(watched), LAYOUT, vae, **more)
    data.set_latents(result.entries, in_memory=False)
    data.index.save()
    return result.kept


def age(*paths):
    """Makes files older than the index is careful about, and caches younger than images."""
    for number, path in enumerate(paths):
        os.utime(path, (1_600_000_000 + number, 1_600_000_000 + number))


def npz(folder):
    return sorted(path.name for path in folder.glob("*.npz"))


def same_batches(left, right, epochs=(1, 2)):
    """Whether two data sets give the same batches, one of them without pixels."""
    for epoch in epochs:
        for plain, cached in zip(left.loader(epoch), right.loader(epoch), strict=True):
            assert cached.pixels is None
            assert torch.allclose(encode(plain.pixels), cached.latents, atol=1e-6)  # float32 sums in another batch
            assert plain.captions == cached.captions
            assert torch.equal(plain.crop_top_lefts, cached.crop_top_lefts)
            assert (plain.control is None) == (cached.control is None)
            assert plain.control is None or torch.equal(plain.control, cached.control)
            assert (plain.masks is None) == (cached.masks is None)
            if plain.masks is not None:
                small = torch.nn.functional.adaptive_avg_pool2d(plain.masks, cached.latents.shape[-2:])
                large = torch.nn.functional.adaptive_avg_pool2d(cached.masks, cached.latents.shape[-2:])
                assert torch.allclose(small, large, atol=1e-6)


def test_control_images_stay_out_of_caches(folder, load, tmp_path):
    """They come with cached latents too, and a cache is the same one with them and without, or with others."""
    control = tmp_path / "control"
    control.mkdir()
    for path in folder.iterdir():
        Image.open(path).rotate(180).save(control / path.name)
    pairs = table(folder, flip_aug=True, conditioning_data_dir=str(control))
    del pairs["subsets"][0]["class_tokens"]
    cached, in_ram = (load(pairs, image_role="control") for _ in range(2))
    assert on_disk(cached) == 0
    in_memory(in_ram)
    plain = load(pairs, image_role="control")
    same_batches(plain, cached)
    same_batches(plain, in_ram)
    assert all(batch.control is not None and batch.masks is None for batch in cached.loader(1))
    assert on_disk(load(table(folder, flip_aug=True))) == 5
    for path in control.iterdir():
        Image.open(path).rotate(90).save(path)
    assert on_disk(load(pairs, image_role="control")) == 5


@pytest.mark.rows("R180", "R181")
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_cached_batches_equal_encoded_ones(folder, load, kind):
    tables = [table(folder, 128, flip_aug=True, num_repeats=2), table(folder, 64)]
    plain, cached, watched, bars = load(*tables), load(*tables), Counted(), []
    chosen = encoder(watched, progress=lambda **kwargs: bars.append(Bar(**kwargs)) or bars[-1])
    in_memory(cached, chosen) if kind == "memory" else on_disk(cached, chosen=chosen)
    same_batches(plain, cached)
    # 5 images and their mirror images at 128, 5 at 64; batches are full but for each size's last.
    assert watched.images == 15
    assert (bars[0].total, bars[0].done, bars[0].unit) == (10, 10, "images")
    assert sorted(shape[0] for shape in watched.shapes if shape[2:] == (128, 128)) == [3, 3]
    assert {shape[2:] for shape in watched.shapes} == {(128, 128), (64, 192), (64, 64)}


@pytest.mark.rows("R253")
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_each_subset_keeps_its_own_flips_and_masks(folder, load, tmp_path, kind):
    other = tmp_path / "other"
    other.mkdir()
    hidden = {"image_dir": str(other), "class_tokens": "y"}
    for name, colour in (("red.png", (255, 0, 0, 100)), ("blue.png", (0, 0, 255, 255))):
        image = Image.new("RGBA", (128, 128), colour)
        image.paste((9, 9, 9, 30), (0, 0, 40, 128))
        image.save(other / name)
    tables = table(folder, flip_aug=True)
    tables["subsets"] += [
        {"image_dir": str(other), "class_tokens": "x", "alpha_mask": True, "flip_aug": True},
        hidden,
    ]
    plain, data = load(tables), load(tables)
    in_memory(data) if kind == "memory" else on_disk(data)
    same_batches(plain, data)
    for record, entry in zip(data.records, data.items.latents, strict=True):
        upright, mask = entry.load(False)
        assert (mask is not None) == (record.path.parent == other and record.subset.class_tokens == "x")
        if record.flip:  # encoded from mirrored pixels; the stand-in's latents mirror exactly
            mirrored, mirrored_mask = entry.load(True)
            assert torch.allclose(mirrored, upright.flip(-1), atol=1e-6)
            assert mask is None or torch.equal(mirrored_mask, mask.flip(-1))


@pytest.mark.rows("R268", "R270")
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_masks_are_cached_along(folder, load, tmp_path, kind):
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in folder.glob("*.png"):
        size = Image.open(path).size
        levels = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(levels).save(masks / path.name)
    tables = table(folder, flip_aug=True, conditioning_data_dir=str(masks))
    del tables["subsets"][0]["class_tokens"]
    plain, data = load(tables), load(tables)
    in_memory(data) if kind == "memory" else on_disk(data)
    same_batches(plain, data)
    assert all(batch.masks is not None for batch in data.loader(1))


def test_a_folder_used_twice_is_encoded_once(folder, load):
    data, watched = load(table(folder), table(folder, num_repeats=3)), Counted()
    in_memory(data, encoder(watched))
    assert watched.images == 5
    assert len(data.records) == 10


def test_latents_do_not_depend_on_the_batch(folder, load):
    """Each image has its own stream for the draw from the posterior, whoever else is encoded with it."""

    def draw(pixels, rngs):
        noise = [torch.randn(1, generator=rng) for rng in rngs]
        return encode(pixels) + torch.stack(noise)[:, :, None, None]

    one, many = load(table(folder, flip_aug=True)), load(table(folder, flip_aug=True), table(folder, 64))
    in_memory(one, encoder(draw, 1))
    in_memory(many, encoder(draw, 4))
    for left, right in zip(one.items.latents, many.items.latents[:5], strict=True):
        assert torch.equal(left.arrays["latents"], right.arrays["latents"])
        assert torch.equal(left.arrays["latents_flipped"], right.arrays["latents_flipped"])
        assert not torch.allclose(left.arrays["latents"], left.arrays["latents_flipped"].flip(-1), atol=1e-3)


def test_no_workers_are_started_for_latents_in_memory(folder, load):
    data = load(table(folder), workers=2)
    assert data.loader(1).num_workers > 0
    in_memory(data)
    assert data.loader(1).num_workers == 0


def test_workers_read_latents_from_disk(folder, load):
    data = load(table(folder, flip_aug=True), workers=2)
    on_disk(data)
    loader = data.loader(1)
    assert loader.num_workers > 0
    same_batches(load(table(folder, flip_aug=True)), data, epochs=(1,))


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_nan_names_the_image(folder, load, kind):
    data = load(table(folder))

    def broken(pixels, rngs):
        latents = encode(pixels)
        latents[-1, 0, 0, 0] = float("nan")
        return latents

    with pytest.raises(UserError, match=r"[0-4]\.png: the VAE gives NaN"):
        in_memory(data, encoder(broken)) if kind == "memory" else on_disk(data, broken)


def test_a_damaged_image_is_named_and_no_thread_is_left(folder, load):
    data = load(table(folder))
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:300])
    before = threading.active_count()
    with pytest.raises(UserError, match=r"1\.png: the image cannot be read"):
        in_memory(data)
    assert threading.active_count() == before


def test_the_default_progress_bar_counts_images(folder, load, capsys):
    in_memory(load(table(folder)))
    assert "caching latents" in capsys.readouterr().err


# ---- on disk


@pytest.mark.rows("R13")
def test_the_next_start_encodes_nothing(folder, load):
    on_disk(load(table(folder, flip_aug=True)))
    assert npz(folder) == [
        "0_0128x0128_test.npz",
        "1_0150x0140_test.npz",
        "2_0130x0128_test.npz",
        "3_0384x0128_test.npz",
        "4_0390x0130_test.npz",
    ]
    again, watched = load(table(folder, flip_aug=True)), Counted()
    on_disk(again, watched)
    assert watched.images == 0
    same_batches(load(table(folder, flip_aug=True)), again)
    assert list(latents.without_files(again.all_records, again.index, LAYOUT)) == []


def test_only_what_changed_is_made_again_and_named(folder, load, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("trainscripts"), "propagate", True)
    on_disk(load(table(folder)))
    Image.new("RGB", (128, 128), "red").save(folder / "0.png")
    npz_of_2 = folder / "2_0130x0128_test.npz"
    npz_of_2.write_bytes(npz_of_2.read_bytes()[:-40])
    data, watched = load(table(folder)), Counted()
    on_disk(data, watched)
    assert watched.images == 2
    assert "0_0128x0128_test.npz" in caplog.text
    assert "2_0130x0128_test.npz" in caplog.text
    same_batches(load(table(folder)), data)


def test_another_vae_makes_all_of_them_again(folder, load):
    on_disk(load(table(folder)), vae="vae 1")
    watched = Counted()
    on_disk(load(table(folder)), watched, vae="vae 2")
    assert watched.images == 5
    watched = Counted()
    on_disk(load(table(folder)), watched, vae="vae 2")
    assert watched.images == 0


def test_flips_are_added_when_they_are_wanted(folder, load):
    on_disk(load(table(folder)))
    data = load(table(folder, flip_aug=True))
    on_disk(data)
    same_batches(load(table(folder, flip_aug=True)), data)


def test_what_a_stopped_run_has_done_is_there_for_the_next(folder, load):
    seen = []

    def stop(pixels, rngs):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(pixels))
        return encode(pixels)

    with pytest.raises(KeyboardInterrupt):
        on_disk(load(table(folder)), chosen=encoder(stop, 1))
    assert len(npz(folder)) == 2
    watched = Counted()
    on_disk(load(table(folder)), chosen=encoder(watched, 1))
    assert watched.images == 3


def test_skipping_the_check_trusts_what_is_there(folder, load):
    on_disk(load(table(folder)), vae="vae 1")
    watched = Counted()
    on_disk(load(table(folder)), watched, vae="vae 2", check=False)
    assert watched.images == 0


def test_one_stem_and_two_extensions_have_two_files(tmp_path, load):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (128, 128), "red").save(folder / "a.png")
    Image.new("RGB", (128, 128), "blue").save(folder / "a.jpg", quality=95)
    data = load(table(folder))
    on_disk(data)
    assert len(npz(folder)) == 2
    same_batches(load(table(folder)), data)


def test_two_resolutions_share_a_file(folder, load):
    tables = [table(folder, 128), table(folder, 64)]
    for _ in range(2):
        data = load(*tables)
        on_disk(data)
        same_batches(load(*tables), data)
    assert len(npz(folder)) == 5
    watched = Counted()
    on_disk(load(*tables), watched)
    assert watched.images == 0


def as_the_ancestor_writes(data, sides, *, suffixed):
    """The files of sd-scripts for these records: since 0.10.2 names of arrays have sizes, before they had none."""
    files = {}
    for record in data.records:
        if record.dataset in sides:
            view = render(record, False, Random(0))
            made = encode(images.to_pixels(view.pixels)[None])[0].numpy()
            size, crop = record.size, buckets.crop_ltrb(record.bucket, record.size)
            end = f"_{made.shape[1]}x{made.shape[2]}" if suffixed else ""  # height first
            arrays = {"latents": made, "original_size": np.array(size), "crop_ltrb": np.array(crop)}
            # The name has the image's size, width first.
            file = record.path.with_name(f"{record.path.stem}_{size.width:04d}x{size.height:04d}_test.npz")
            files.setdefault(file, {}).update({name + end: array for name, array in arrays.items()})
    for file, arrays in files.items():
        np.savez(file, **arrays)


@pytest.mark.rows("R500")
@pytest.mark.parametrize("check", [True, False])
def test_files_of_the_ancestor_with_sizes_are_used_at_every_size(folder, load, check):
    tables, watched = [table(folder, 128), table(folder, 64)], Counted()
    data = load(*tables)
    as_the_ancestor_writes(data, {0, 1}, suffixed=True)
    assert on_disk(data, watched, check=check) == 10
    assert watched.images == 0
    same_batches(load(*tables), data)


@pytest.mark.rows("R500")
@pytest.mark.parametrize("check", [True, False])
def test_files_of_the_ancestor_without_sizes_serve_one_of_two_datasets(folder, load, check):
    """The other is encoded and gets latents of its own beside them, in the same files."""
    tables, watched = [table(folder, 128), table(folder, 64)], Counted()
    data = load(*tables)
    as_the_ancestor_writes(data, {0}, suffixed=False)
    assert on_disk(data, watched, check=check) == 5
    assert watched.images == 5
    assert all(height * width <= 64 * 64 for _, _, height, width in watched.shapes)
    same_batches(load(*tables), data)
    assert len(npz(folder)) == 5
    again = Counted()
    assert on_disk(load(*tables), again, check=check) == 10


def test_latents_without_images(folder, load, tmp_path):
    on_disk(load(table(folder, flip_aug=True)))
    for path in list(folder.glob("*.png")):
        path.unlink()
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({str(number): {"caption": f"image {number}"} for number in range(5)}))
    tables = table(folder, metadata_file=str(meta), flip_aug=True)
    del tables["subsets"][0]["class_tokens"]
    data, watched = load(tables), Counted()
    on_disk(data, watched, vae="another")  # there is nothing to make them again from
    assert watched.images == 0
    assert {caption for batch in data.loader(1) for caption in batch.captions} == {f"image {n}" for n in range(5)}


def test_a_lost_image_with_broken_latents_is_an_error(folder, load, tmp_path):
    on_disk(load(table(folder)))
    for path in list(folder.glob("*.png")):
        path.unlink()
    (folder / "0_0128x0128_test.npz").write_bytes(b"x")
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({str(number): {"caption": f"image {number}"} for number in range(5)}))
    tables = table(folder, metadata_file=str(meta))
    del tables["subsets"][0]["class_tokens"]
    with pytest.raises(UserError, match=r"0_0128x0128_test\.npz.*there is no image"):
        on_disk(load(tables))


@pytest.mark.rows("R256")
def test_a_file_that_breaks_during_the_run_is_named(folder, load):
    data = load(table(folder))
    on_disk(data)
    file = folder / "4_0390x0130_test.npz"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"4_0390x0130_test\.npz"):
        list(chain(data.loader(1)))


def test_a_folder_that_cannot_be_written_is_named(folder, load, monkeypatch):
    from library.caching import store

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write", full)
    with pytest.raises(UserError, match=r"_test\.npz: the cache file cannot be written \(No space left on device\)"):
        on_disk(load(table(folder)))
