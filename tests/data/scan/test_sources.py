"""Every style of data set, from its files to records: metadata files, masks, metadata_cache.json, what is left out."""

from __future__ import annotations

import json
import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.config.blueprint import build_specs
from library.data.sample.dataset import build_training_data
from library.data.scan import near_duplicates
from library.data.scan.index import FileIndex
from library.errors import UserError
from library.options.finetune import FinetuneData
from library.options.loss import LossOptions
from library.options.sampling import ValidationOptions
from library.options.training import TrainingOptions
from library.types import Size
from tests.builders.options import options_with


@pytest.fixture
def load(make_opts, traits, tmp_path):
    """TrainingData by flags, 64x64."""

    def build(seed=1, image_role="mask", **options):
        opts = make_opts(**{"resolution": "64", "data_index_dir": str(tmp_path / "index"), **options})
        return build_training_data(build_specs(opts, traits, image_role), opts, traits, seed)

    return build


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("trainscripts"), "propagate", True)
    return caplog


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


# ---- metadata files


@pytest.fixture
def images(tmp_path, draw):
    for name in ("a.png", "b.jpg", "c.v2.webp"):
        draw(tmp_path / "images" / name)
    return tmp_path / "images"


@pytest.mark.rows("R197", "R198", "R221")
@pytest.mark.parametrize("keys", ["stems", "names", "paths"])
def test_a_metadata_file(tmp_path, images, load, keys):
    files = sorted(images.iterdir())
    key = {"stems": lambda p: p.name.rpartition(".")[0], "names": lambda p: p.name, "paths": str}[keys]
    texts = [{"caption": "a cat", "tags": "red, blue"}, {"caption": "a dog"}, {"tags": "green"}]
    meta = write_json(tmp_path / "m.json", {key(file): text for file, text in zip(files, texts, strict=True)})
    data = load(in_json=meta, train_data_dir=str(images), dataset_repeats=4)
    assert [(r.path, r.caption) for r in data.records] == list(
        zip(files, ["a cat,red, blue", "a dog", "green"], strict=True)
    )
    assert data.num_train_images == 12


@pytest.mark.rows("R196", "R197")
def test_keep_tokens_keeps_the_caption_before_its_tags(tmp_path, images, load):
    meta = write_json(tmp_path / "m.json", {"a": {"caption": "a cat", "tags": "red, blue, green, white"}})
    data = load(in_json=meta, train_data_dir=str(images), shuffle_caption=True, keep_tokens=1)
    captions = {batch.captions[0] for epoch in range(1, 9) for batch in data.loader(epoch)}
    assert len(captions) > 1
    assert all(caption.startswith("a cat, ") for caption in captions)
    assert {frozenset(caption.split(", ")) for caption in captions} == {
        frozenset(["a cat", "red", "blue", "green", "white"])
    }


def test_entries_without_an_image_are_left_out_and_named(tmp_path, images, load):
    meta = write_json(tmp_path / "m.json", {"a": {"caption": "x"}, "gone": {"caption": "y"}})
    data = load(in_json=meta, train_data_dir=str(images))
    assert len(data.records) == 1
    assert any(line.startswith(f"left out: {meta}: no image for 'gone'") for line in data.report())
    with pytest.raises(UserError, match=r"no image for 'gone'.*\(--strict\)"):
        load(in_json=meta, train_data_dir=str(images), strict=True)
    none = write_json(tmp_path / "n.json", {"gone": {"caption": "y"}})
    with pytest.raises(UserError, match="no usable training image"):
        load(in_json=none, train_data_dir=str(images))


def test_entries_with_only_latents_are_known_by_them(tmp_path, images, load):
    np.savez(images / "old.npz", latents=np.zeros((4, 8, 8), np.float32), original_size=np.array([64, 64]))
    (images / "new_0064x0064_test.npz").write_bytes(b"looked into later")
    meta = write_json(tmp_path / "m.json", {name: {"caption": name} for name in ("old", "new", "a")})
    data = load(in_json=meta, train_data_dir=str(images))
    assert [(r.path.name, r.present, r.size) for r in data.records] == [
        ("a.png", True, (64, 64)),
        ("new", False, (64, 64)),
        ("old", False, (64, 64)),
    ]
    assert "2 images of which only latents are there" in data.report()
    with pytest.raises(UserError, match="color_aug needs the images, and some have latents only"):
        load(in_json=meta, train_data_dir=str(images), color_aug=True)


def test_the_report_has_the_sizes_that_are_trained(tmp_path, images, traits):
    """Without --resolution: those of prepared latents, or the default where an image has none."""
    sizes = {"a": (64, 96), "b": (64, 96), "c.v2": (64, 96)}
    for name, (width, height) in sizes.items():
        latents = np.zeros((4, height // 8, width // 8), np.float32)
        np.savez(images / f"{name}.npz", latents=latents, original_size=np.array([64, 64]), crop_ltrb=np.zeros(4))
    entries = {name: {"caption": "x", "train_resolution": size} for name, size in sizes.items()}

    def report(**more):
        given = {"train_data_dir": str(images), "in_json": write_json(tmp_path / "m.json", entries)}
        opts = options_with(FinetuneData, LossOptions, TrainingOptions, ValidationOptions, **given, **more)
        return build_training_data(build_specs(opts, traits), opts, traits, 1).report()

    lines = report()
    assert lines[0].startswith("dataset 1: 64x96, ")
    assert not any("--resolution" in line for line in lines)
    (images / "c.v2.npz").unlink()
    del entries["c.v2"]["train_resolution"]
    lines = report(enable_bucket=True)
    assert "  --resolution was not given: images without prepared latents are trained at 512x512" in lines


@pytest.mark.rows("R110")
def test_a_file_of_mirrored_latents_turns_mirroring_on(tmp_path, images, load):
    np.savez(images / "a_flip.npz", np.zeros((4, 8, 8), np.float32))
    meta = write_json(tmp_path / "m.json", {"a": {"caption": "a"}, "b": {"caption": "b"}})
    data = load(in_json=meta, train_data_dir=str(images))
    assert [record.flip for record in data.records] == [True, False]


def test_metadata_of_a_metadata_data_set(tmp_path, images, make_opts, traits, write_config):
    meta = write_json(tmp_path / "m.json", {"a": {"caption": "a cat, sitting", "tags": "Red, blue"}})
    subset = {"metadata_file": meta, "image_dir": str(images), "num_repeats": 2}
    opts = make_opts(dataset_config=write_config({"datasets": [{"resolution": 64, "subsets": [subset]}]}))
    values = build_training_data(build_specs(opts, traits), opts, traits, 1).metadata()
    (dataset,) = json.loads(values["ss_datasets"])
    assert dataset["is_dreambooth"] is False
    assert dataset["subsets"][0]["metadata_file"] == "m.json"
    assert json.loads(values["ss_tag_frequency"]) == {"m.json": {"red": 1, "blue": 1}}
    assert json.loads(values["ss_dataset_dirs"]) == {"m.json": {"n_repeats": 2, "img_count": 1}}


# ---- masks


@pytest.fixture
def masked(tmp_path, draw):
    """Two images, and masks with another level on each side, one in another format and half the size."""
    for name in ("a.png", "b.png"):
        draw(tmp_path / "images" / name)
    masks = tmp_path / "masks"
    masks.mkdir()
    for name, side in (("a.png", 64), ("b.bmp", 32)):
        levels = np.zeros((side, side, 3), np.uint8)
        levels[:, : side // 2, 0] = 255
        levels[:, side // 2 :, 0] = 128
        levels[..., 1] = 77  # green and blue say nothing
        Image.fromarray(levels).save(masks / name)
    return {"train_data_dir": str(tmp_path / "images"), "conditioning_data_dir": str(masks), "masked_loss": True}


@pytest.mark.rows("R267", "R268", "R270")
def test_the_red_channel_of_a_mask_weighs_the_loss(masked, load):
    for batch in load(**masked).loader(1):
        assert batch.masks.shape == (1, 1, 64, 64)
        assert torch.all(batch.masks[..., :31] == 1.0)
        assert torch.allclose(batch.masks[..., 33:], torch.tensor(128 / 255))


def test_masks_are_mirrored_with_their_images(masked, load):
    data = load(**masked, flip_aug=True)
    plain = {batch.keys[0]: batch for batch in load(**masked).loader(1)}
    mirrored = 0
    for epoch in range(1, 5):
        for batch in data.loader(epoch):
            expected = plain[batch.keys[0]]
            if torch.equal(batch.pixels, expected.pixels):
                assert torch.equal(batch.masks, expected.masks)
            else:
                mirrored += 1
                assert torch.equal(batch.pixels, expected.pixels.flip(-1))
                assert torch.equal(batch.masks, expected.masks.flip(-1))
    assert 0 < mirrored < 8


def test_an_image_without_a_mask_is_an_error_and_a_mask_without_an_image_a_warning(
    masked, load, tmp_path, draw, warnings
):
    draw(tmp_path / "masks" / "z.png")
    load(**masked)
    assert "1 images belong to no image of the data set" in warnings.text
    draw(tmp_path / "images" / "c.png")
    with pytest.raises(UserError, match=r"masks: no mask for 1 images of .*images: c\.png"):
        load(**masked)


def test_a_broken_mask_leaves_its_image_out(masked, load, tmp_path):
    (tmp_path / "masks" / "a.png").write_bytes(b"")
    data = load(**masked)
    assert [record.path.name for record in data.records] == ["b.png"]
    assert any("its mask" in line and "the file is empty" in line for line in data.report())


def test_a_mask_of_another_shape_is_reported(masked, load, tmp_path):
    Image.new("RGB", (64, 32), "white").save(tmp_path / "masks" / "a.png")
    assert any(line.startswith("1 masks of another shape") for line in load(**masked).report())


# ---- control images


@pytest.fixture
def controlled(tmp_path, draw):
    """Two images of 96x64 and as control images copies of them, one in another format and half the size."""
    for name in ("a.png", "b.png"):
        image = Image.open(draw(tmp_path / "images" / name, (96, 64)))
        (tmp_path / "control").mkdir(exist_ok=True)
        image.save(tmp_path / "control" / name)
    image.resize((48, 32), Image.Resampling.NEAREST).save(tmp_path / "control" / "b.bmp")
    (tmp_path / "control" / "b.png").unlink()
    folders = {"train_data_dir": str(tmp_path / "images"), "conditioning_data_dir": str(tmp_path / "control")}
    return {**folders, "resolution": "64,64", "enable_bucket": True, "min_bucket_reso": 64, "image_role": "control"}


def test_a_control_image_comes_with_its_image_and_weighs_nothing(controlled, load):
    for batch in load(**controlled).loader(1):
        assert batch.control.shape == batch.pixels.shape
        assert batch.masks is None
        assert 0 <= batch.control.min() < 0.1
        assert 0.9 < batch.control.max() <= 1
        if batch.keys[0].endswith("a.png"):
            assert torch.allclose(batch.control, (batch.pixels + 1) / 2, atol=1e-6)


@pytest.mark.parametrize("cut", [{}, {"random_crop": True}])
def test_control_images_are_cut_and_mirrored_with_their_images(controlled, load, cut):
    data = load(**controlled, flip_aug=True, resize_interpolation="area", **cut)
    seen = set()
    for epoch in range(1, 7):
        for batch in data.loader(epoch):
            if batch.keys[0].endswith("a.png"):
                assert torch.allclose(batch.control, (batch.pixels + 1) / 2, atol=1e-6)
                seen.add(batch.control.numpy().tobytes())
    assert len(seen) > 1


def test_an_image_without_a_control_image_is_an_error(controlled, load, tmp_path, draw):
    draw(tmp_path / "images" / "c.png")
    with pytest.raises(UserError, match=r"control: no control image for 1 images of .*images: c\.png") as error:
        load(**controlled)
    assert len(error.value.problems) == 1


def test_a_broken_control_image_leaves_its_image_out(controlled, load, tmp_path):
    (tmp_path / "control" / "a.png").write_bytes(b"")
    data = load(**controlled)
    assert [record.path.name for record in data.records] == ["b.png"]
    assert any("its control image" in line and "the file is empty" in line for line in data.report())


def test_a_control_image_of_another_shape_is_stretched_and_told(controlled, load, tmp_path):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "control" / "a.png")
    data = load(**controlled)
    assert any(line.startswith("1 control images of another shape") for line in data.report())
    assert {batch.control.shape for batch in data.loader(1)} == {batch.pixels.shape for batch in data.loader(1)}


@pytest.mark.rows("R255", "R271")
def test_transparency_weighs_the_loss(tmp_path, load):
    image = Image.new("RGBA", (64, 64), (10, 20, 30, 255))
    image.paste((200, 100, 50, 0), (0, 0, 32, 64))
    image.paste((200, 100, 50, 128), (32, 0, 48, 64))
    (tmp_path / "1_x").mkdir()
    image.save(tmp_path / "1_x" / "a.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "1_x" / "b.png")
    for batch in load(train_data_dir=str(tmp_path), alpha_mask=True, train_batch_size=2).loader(1):
        see_through = batch.keys.index(str(tmp_path / "1_x" / "a.png"))
        mask = batch.masks[see_through, 0]
        assert torch.all(mask[:, :32] == 0)
        assert torch.allclose(mask[:, 32:48], torch.tensor(128 / 255))
        assert torch.all(mask[:, 48:] == 1)
        assert torch.all(batch.masks[1 - see_through] == 1)  # what has no transparency counts in full
        colours = (batch.pixels[see_through, :, 0, 0] + 1) * 127.5
        assert torch.allclose(colours, torch.tensor([200.0, 100.0, 50.0]), atol=1e-3)  # as stored, not blended


def test_without_alpha_mask_there_are_no_masks(tmp_path, load, draw):
    draw(tmp_path / "1_x" / "a.png")
    assert all(batch.masks is None for batch in load(train_data_dir=str(tmp_path)).loader(1))


# ---- metadata_cache.json


@pytest.mark.rows("R254")
def test_sizes_and_captions_are_kept_and_trusted(tmp_path, draw, load):
    folder = tmp_path / "2_cat"
    draw(folder / "a.png", caption="one")
    draw(folder / "b.png")
    first = load(train_data_dir=str(tmp_path), cache_info=True)
    kept = json.loads((folder / "metadata_cache.json").read_text(encoding="utf-8"))
    assert kept == {
        str(folder / "a.png"): {"caption": "one", "resolution": [64, 64]},
        str(folder / "b.png"): {"caption": "cat", "resolution": [64, 64]},
    }
    draw(folder / "c.png")
    (folder / "a.caption").write_text("changed")
    again = load(train_data_dir=str(tmp_path), cache_info=True)
    assert [(r.path, r.caption, r.size) for r in again.records] == [(r.path, r.caption, r.size) for r in first.records]
    fresh = load(train_data_dir=str(tmp_path))
    assert [r.caption for r in fresh.records] == ["changed", "cat", "cat"]


def test_nothing_is_written_beside_images_unless_asked(tmp_path, draw, load):
    image = draw(tmp_path / "images" / "2_cat" / "a.png")
    before = image.read_bytes()
    list(load(train_data_dir=str(tmp_path / "images")).loader(1))
    assert os.listdir(image.parent) == ["a.png"]
    assert image.read_bytes() == before


# ---- what is left out


def test_broken_images_are_left_out_and_end_a_strict_run(tmp_path, draw, load):
    draw(tmp_path / "1_x" / "good.png")
    (tmp_path / "1_x" / "empty.png").write_bytes(b"")
    (tmp_path / "1_x" / "text.jpg").write_text("no image")
    data = load(train_data_dir=str(tmp_path))
    assert [record.path.name for record in data.records] == ["good.png"]
    lines = [line for line in data.report() if line.startswith("left out: ")]
    assert len(lines) == 2
    assert "2 images left out" in data.report()
    with pytest.raises(UserError) as caught:
        load(train_data_dir=str(tmp_path), strict=True)
    assert len(caught.value.problems) == 2
    assert all("(--strict)" in line for line in caught.value.problems)


def test_forgotten_captions_and_odd_shapes_are_named(tmp_path, draw, load):
    draw(tmp_path / "1_x" / "told.png", caption="words")
    draw(tmp_path / "1_x" / "forgotten.png")
    draw(tmp_path / "1_y" / "no captions here.png")
    draw(tmp_path / "1_y" / "strip.png", size=(512, 32))
    lines = load(train_data_dir=str(tmp_path), enable_bucket=True, min_bucket_reso=64, max_bucket_reso=64).report()
    assert any(
        line.startswith("1 image without a caption where most") and line.endswith("forgotten.png") for line in lines
    )
    assert any(line.startswith("1 image of an odd shape") and line.endswith("strip.png") for line in lines)


def test_images_of_other_kinds_are_named(tmp_path, draw, load):
    draw(tmp_path / "1_x" / "a.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "1_x" / "b.GIF")
    data = load(train_data_dir=str(tmp_path))
    assert len(data.records) == 1
    assert any("b.GIF: images of this kind are not read" in line for line in data.report())


def damage_pixels(path):
    """One wrong byte inside the compressed pixels; header and end stay whole."""
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 200] ^= 0xFF
    path.write_bytes(content)


def test_pixels_that_cannot_be_decoded_are_found_at_start(tmp_path, draw, load):
    draw(tmp_path / "1_x" / "good.png")
    damage_pixels(draw(tmp_path / "1_x" / "bad.png"))
    data = load(train_data_dir=str(tmp_path))
    assert [record.path.name for record in data.records] == ["good.png"]
    assert any(line.startswith(f"left out: {tmp_path / '1_x' / 'bad.png'}: ") for line in data.report())


def test_in_large_sets_damaged_pixels_are_named_when_they_are_met(tmp_path, draw, load, monkeypatch):
    monkeypatch.setattr(near_duplicates, "MOST", 1)
    draw(tmp_path / "1_x" / "good.png")
    damage_pixels(draw(tmp_path / "1_x" / "bad.png"))
    data = load(train_data_dir=str(tmp_path))
    assert len(data.records) == 2
    assert "images were not decoded to find damaged ones and near duplicates, as there are more than 1" in data.report()
    with pytest.raises(UserError, match=r"bad\.png: the image cannot be read"):
        list(data.loader(1))


def test_the_second_start_looks_into_nothing(tmp_path, draw, load, monkeypatch):
    from library.data.sample import images

    for name in ("a.png", "b.png"):
        path = draw(tmp_path / "1_x" / name, caption="words")
        for file in (path, path.with_suffix(".caption")):
            os.utime(file, (1_600_000_000, 1_600_000_000))
    first = load(train_data_dir=str(tmp_path))

    def never(path):
        raise AssertionError(f"{path} was looked into")

    monkeypatch.setattr(images, "probe", never)
    again = load(train_data_dir=str(tmp_path))
    assert [(r.path, r.size, r.caption) for r in again.records] == [(r.path, r.size, r.caption) for r in first.records]


# ---- what looks the same


def test_equal_and_alike_images_are_reported(tmp_path, load):
    folder = tmp_path / "1_x"
    folder.mkdir()
    waves = np.random.default_rng(5).standard_normal((8, 8, 3))
    image = Image.fromarray(((waves - waves.min()) / np.ptp(waves) * 255).astype(np.uint8))
    image = image.resize((64, 64), Image.Resampling.BICUBIC)
    image.save(folder / "a.png")
    image.save(folder / "again.png")
    image.save(folder / "saved.jpg", quality=70)
    Image.fromarray(np.random.default_rng(6).integers(0, 255, (64, 64, 3), np.uint8)).save(folder / "other.png")
    lines = load(train_data_dir=str(tmp_path)).report()
    assert f"the same image: {folder / 'a.png'}, {folder / 'again.png'}" in lines
    assert f"1 group of near duplicates, such as {folder / 'a.png'}, {folder / 'saved.jpg'}" in lines
    assert not any("other.png" in line for line in lines)


@pytest.mark.parametrize("length", [1_000, 200_000])
def test_copies_are_found_among_files_of_one_length(tmp_path, length):
    """Larger files are distinguished by their ends first; what then looks equal is compared in full."""

    def write(name, start, end):
        content = bytes([start]) + bytes(length - 2) + bytes([end])
        (tmp_path / name).write_bytes(content)

    for name, start, end in (("a", 1, 1), ("b", 1, 2), ("c", 1, 1), ("d", 2, 1), ("e", 1, 2), ("f", 3, 3)):
        write(name, start, end)
    sizes = {tmp_path / name: Size(8, 8) for name in "abcdef"} | {tmp_path / "none": Size(8, 8)}
    found = near_duplicates.copies(sizes, FileIndex(None))
    expected = {"a": "a", "c": "a", "b": "b", "e": "b"}
    assert {path.name: first.name for path, first in found.items()} == expected


# ---- what goes through to the batch


def test_multipliers_and_attributes_reach_the_batch(tmp_path, draw, make_opts, traits, write_config):
    draw(tmp_path / "one" / "a.png")
    draw(tmp_path / "two" / "b.png")
    datasets = [
        {"resolution": 64, "network_multiplier": -0.5, "subsets": [{"image_dir": str(tmp_path / "one")}]},
        {"resolution": 64, "subsets": [{"image_dir": str(tmp_path / "two"), "custom_attributes": {"style": "ink"}}]},
    ]
    opts = make_opts(dataset_config=write_config({"datasets": datasets}))
    batches = list(build_training_data(build_specs(opts, traits), opts, traits, 1).loader(1))
    found = {batch.keys[0][-5:]: (batch.network_multiplier, batch.attributes) for batch in batches}
    assert found == {"a.png": (-0.5, [None]), "b.png": (1.0, [{"style": "ink"}])}
