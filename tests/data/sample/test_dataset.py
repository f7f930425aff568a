"""From folders to batches: order, repeats, regularisation, sizes, randomness by item, workers."""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import tracemalloc
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.config.blueprint import build_specs
from library.data.sample import images
from library.data.sample.dataset import ItemDataset, build_training_data
from library.data.sample.rendering import render
from library.data.scan import near_duplicates
from library.data.types import ItemKey
from library.errors import UserError


@pytest.fixture
def load(make_opts, traits):
    """TrainingData of a folder of <repeats>_<class> folders, 64x64 unless said otherwise."""

    def build(train, seed=1, **options):
        opts = make_opts(**{"train_data_dir": str(train), "resolution": "64", **options})
        return build_training_data(build_specs(opts, traits), opts, traits, seed)

    return build


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("trainscripts"), "propagate", True)
    return caplog


BUCKETS = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 256, "resolution": "128"}


def names(data):
    return [(record.path.name, record.repeats) for record in data.records]


def repeats(data):
    return [count for _, count in names(data)]


@pytest.mark.rows("R59", "R209", "R214")
def test_repeats_order_and_captions(tmp_path, draw, load):
    for name in ("b.png", "a.PNG", "C.Jpg", "10.webp"):
        draw(tmp_path / "3_sks dog" / name)
    (tmp_path / "3_sks dog" / "b.caption").write_text("from file\nsecond line")
    (tmp_path / "3_sks dog" / "notes.md").write_text("x")
    data = load(tmp_path)
    assert names(data) == [("10.webp", 3), ("C.Jpg", 3), ("a.PNG", 3), ("b.png", 3)]
    assert [record.caption for record in data.records] == ["sks dog", "sks dog", "sks dog", "from file"]
    assert (data.num_train_images, data.num_reg_images, data.batches_per_epoch) == (12, 0, 12)
    assert len(data.items) == 12


@pytest.mark.rows("R208", "R209", "R252")
def test_too_few_regularisation_images_repeat_in_turn(tmp_path, draw, load):
    for name in ("a.png", "b.png", "c.png"):
        draw(tmp_path / "train" / "3_x" / name)
    draw(tmp_path / "reg" / "1_one" / "r1.png")
    for name in ("r2.png", "r3.png"):
        draw(tmp_path / "reg" / "2_two" / name)
    data = load(tmp_path / "train", reg_data_dir=str(tmp_path / "reg"))
    # 1 + 2 + 2 = 5; four more for 9: each gets one, then the first another.
    assert repeats(data) == [3, 3, 3, 3, 3, 3]
    assert data.num_train_images == data.num_reg_images == 9
    assert [record.caption for record in data.records[3:]] == ["one", "two", "two"]


@pytest.mark.rows("R203")
def test_an_identifier_and_a_class_are_the_prompt(tmp_path, draw, load):
    draw(tmp_path / "20_shs dog" / "a.png")
    assert [batch.captions for batch in load(tmp_path).loader(1)] == [["shs dog"]] * 20


@pytest.mark.rows("R59", "R199")
@pytest.mark.parametrize("extension", [None, ".caption", ".txt", ".my_words"])
def test_captions_lie_beside_images(tmp_path, draw, load, extension):
    """Every kind of file is there; the one in force decides. Another image's words are not taken."""
    for ending in (".caption", ".txt", ".my_words"):
        draw(tmp_path / "1_x" / "a.png", caption=f"a cat, says {ending}", extension=ending)
    draw(tmp_path / "1_x" / "b.png")
    given = {} if extension is None else {"caption_extension": extension}
    data = load(tmp_path, train_batch_size=2, **given)
    (batch,) = data.loader(1)
    assert sorted(batch.captions) == [f"a cat, says {extension or '.caption'}", "x"]


@pytest.mark.rows("R200")
def test_captions_are_shuffled_on_request_only(tmp_path, draw, load):
    draw(tmp_path / "1_x" / "a.png", caption="a, b, c, d")

    def seen(**options):
        data = load(tmp_path, **options)
        return {batch.captions[0] for epoch in range(1, 30) for batch in data.loader(epoch)}

    assert seen() == {"a, b, c, d"}
    assert len({words[0] for words in seen(shuffle_caption=True)}) == 4  # no token is kept first
    assert {words[0] for words in seen(shuffle_caption=True, keep_tokens=1)} == {"a"}


@pytest.mark.rows("R215")
def test_regularisation_images_are_items_among_others(tmp_path, draw, load):
    for name in ("a.png", "b.png"):
        draw(tmp_path / "train" / "2_x" / name)
        draw(tmp_path / "reg" / "2_y" / name)
    data = load(tmp_path / "train", reg_data_dir=str(tmp_path / "reg"), train_batch_size=2)
    batches = list(data.loader(1))
    assert [len(batch.pixels) for batch in batches] == [2] * 4  # a batch is as large as asked for, not twice that
    assert Counter(caption for batch in batches for caption in batch.captions) == {"x": 4, "y": 4}


@pytest.mark.rows("R209")
def test_surplus_regularisation_images_stay_unused(tmp_path, draw, load):
    draw(tmp_path / "train" / "3_x" / "a.png")
    for name in ("r1.png", "r2.png", "r3.png"):
        draw(tmp_path / "reg" / "2_y" / name)
    data = load(tmp_path / "train", reg_data_dir=str(tmp_path / "reg"))
    assert names(data) == [("a.png", 3), ("r1.png", 2), ("r2.png", 2)]
    assert any("1 image for regularisation not used" in line for line in data.report())


@pytest.mark.rows("R207", "R213")
def test_prior_loss_weight(tmp_path, draw, load, make_opts, traits):
    draw(tmp_path / "train" / "1_x" / "a.png")
    draw(tmp_path / "reg" / "1_y" / "r.png")
    opts = make_opts(
        train_data_dir=str(tmp_path / "train"),
        reg_data_dir=str(tmp_path / "reg"),
        resolution="64",
        prior_loss_weight=0.25,
    )
    data = build_training_data(build_specs(opts, traits), opts, traits, 1)
    weights = {batch.captions[0]: batch.loss_weights.item() for batch in data.loader(1)}
    assert weights == {"x": 1.0, "y": 0.25}
    assert all(batch.loss_weights.item() == 1.0 for batch in load(tmp_path / "train").loader(1))


@pytest.mark.rows("R37", "R42", "R51")
def test_batches_hold_one_bucket_and_everything_once(tmp_path, draw, load):
    sizes = {"a.png": (100, 100), "b.png": (300, 300), "c.png": (300, 100), "d.png": (600, 200), "e.png": (90, 270)}
    for name, size in sizes.items():
        draw(tmp_path / "2_x" / name, size)
    data = load(tmp_path, train_batch_size=3, **BUCKETS)
    seen = Counter()
    shapes = []
    for batch in data.loader(1):
        assert batch.pixels.shape[0] == len(batch.captions) <= 3
        assert batch.target_sizes.tolist() == [[batch.pixels.shape[3], batch.pixels.shape[2]]] * len(batch.captions)
        shapes.append(tuple(batch.pixels.shape))
        seen.update(key.rsplit("/")[-1] for key in batch.keys)
    assert seen == dict.fromkeys(sizes, 2)
    assert sorted(shapes) == [(1, 3, 64, 192), (1, 3, 128, 128), (2, 3, 192, 64), (3, 3, 64, 192), (3, 3, 128, 128)]
    assert data.batches_per_epoch == 5 == len(data.plan(1))


@pytest.mark.rows("R56")
def test_images_of_any_size_in_any_folder(tmp_path, draw, make_opts, write_config, traits):
    folder = tmp_path / "Fotos (2023)" / "ünï 猫"
    sizes = [(1, 1), (31, 9), (64, 64), (1920, 1080), (1000, 30), (37, 900)]
    for width, height in sizes:
        draw(folder / f"{width}x{height}.png", (width, height))
    subset = {"image_dir": str(folder), "class_tokens": "x"}
    file = write_config({"datasets": [{"resolution": 128, "subsets": [subset]}]})
    opts = make_opts(dataset_config=file, **{**BUCKETS, "resolution": None})
    data = build_training_data(build_specs(opts, traits), opts, traits, 1)
    shapes = {key.rsplit("/")[-1]: batch.pixels.shape[2:] for batch in data.loader(1) for key in batch.keys}
    assert shapes == {
        "1x1.png": (128, 128),
        "31x9.png": (64, 192),  # height, width: of the buckets 1:1, 3:1, 4:1 the one nearest in shape
        "64x64.png": (128, 128),
        "1920x1080.png": (128, 128),
        "1000x30.png": (64, 256),
        "37x900.png": (256, 64),
    }


@pytest.mark.rows("R198", "R201")
def test_dataset_repeats_lengthens_the_epoch(tmp_path, draw, make_opts, write_config, traits):
    for name in ("silent/a.png", "silent/b.png", "own/c.png"):
        draw(tmp_path / name)
    subsets = [{"image_dir": str(tmp_path / "silent")}, {"image_dir": str(tmp_path / "own"), "num_repeats": 2}]
    file = write_config({"datasets": [{"resolution": 64, "subsets": subsets}]})

    def seen(**options):
        opts = make_opts(dataset_config=file, **options)
        data = build_training_data(build_specs(opts, traits), opts, traits, 1)
        return Counter(batch.keys[0].rsplit("/")[-1] for batch in data.loader(1))

    assert seen() == {"a.png": 1, "b.png": 1, "c.png": 2}
    assert seen(dataset_repeats=3) == {"a.png": 3, "b.png": 3, "c.png": 2}


@pytest.mark.rows("C64")
def test_three_resolutions_and_batch_sizes_over_one_folder(tmp_path, draw, make_opts, write_config, traits):
    """The config as published, with its spaces and its marks."""
    folder = tmp_path / "path" / "to" / "image" / "dir"
    for number in range(5):
        draw(folder / f"{number}.png", caption="1girl ||| stage, mic ||| best quality", extension=".txt")
    general = """
[general]
flip_aug = true
color_aug = false
keep_tokens_separator= "|||"
shuffle_caption = false
caption_tag_dropout_rate = 0
caption_extension = ".txt"
"""
    dataset = """
[[datasets]]
batch_size = {batch}
enable_bucket = true
resolution = [{side}, {side}]

  [[datasets.subsets]]
  image_dir = "{folder}"
  num_repeats = 1
"""
    parts = [dataset.format(batch=b, side=s, folder=folder.as_posix()) for b, s in ((2, 1024), (3, 768), (4, 512))]
    opts = make_opts(dataset_config=write_config(general + "".join(parts)))
    data = build_training_data(build_specs(opts, traits), opts, traits, 1)
    batches = list(data.loader(1))
    assert sorted((batch.pixels.shape[3], len(batch.pixels)) for batch in batches) == [
        (512, 1), (512, 4), (768, 2), (768, 3), (1024, 1), (1024, 2), (1024, 2),
    ]  # fmt: skip
    assert {caption for batch in batches for caption in batch.captions} == {"1girl, stage, mic, best quality"}


def test_plan_depends_on_seed_and_epoch_only(tmp_path, draw, load):
    for number in range(12):
        draw(tmp_path / "1_x" / f"{number}.png")
    data, again, other = load(tmp_path), load(tmp_path), load(tmp_path, seed=2)
    second = data.plan(2)
    assert data.plan(1) == again.plan(1)
    assert second == again.plan(2)
    assert data.plan(1) != second
    assert data.plan(1) != other.plan(1)


RANDOM = {
    "flip_aug": True,
    "color_aug": True,
    "random_crop": True,
    "shuffle_caption": True,
    "caption_dropout_rate": 0.2,
}


def same(left, right):
    assert (left.captions, left.keys) == (right.captions, right.keys)
    for name in ("pixels", "latents", "loss_weights", "original_sizes", "crop_top_lefts", "target_sizes"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.fixture
def varied(tmp_path, draw, load):
    """Data where everything varies by chance."""

    def build(**options):
        folder = tmp_path / "2_x"
        if not folder.exists():
            for number in range(7):
                draw(folder / f"{number}.png", (150 + 10 * number, 130), caption="a, b, c, d, e, f")
        return load(tmp_path, train_batch_size=2, **RANDOM, **BUCKETS, **options)

    return build


def test_worker_count_changes_speed_only(varied):
    data = varied()
    for epoch in (1, 2):
        alone = list(data.loader(epoch, workers=0))
        loader = varied().loader(epoch, workers=2)
        assert loader.num_workers >= 1
        for left, right in zip(alone, loader, strict=True):
            same(left, right)


def test_persistent_workers_learn_of_the_epoch(varied):
    data = varied(persistent_data_loader_workers=True, max_data_loader_n_workers=2)
    loader = data.loader(1)
    first = list(loader)
    assert data.loader(2) is loader
    second = list(loader)
    plain = varied()
    for epoch, batches in ((1, first), (2, second)):
        for left, right in zip(plain.loader(epoch), batches, strict=True):
            same(left, right)
    assert data.loader(1, workers=0) is not loader
    loader._iterator._shutdown_workers()


def test_items_vary_between_epochs_and_repeats(varied):
    items = varied().items
    one = items[ItemKey(1, 0, 0)]
    assert torch.equal(one.pixels, items[ItemKey(1, 0, 0)].pixels)
    others = [items[ItemKey(epoch, 0, index)] for epoch in (1, 2, 3, 4) for index in (0, 1)]
    assert len({sample.caption for sample in others}) > 4
    assert len({sample.pixels.sum().item() for sample in others}) > 4


def test_starting_within_an_epoch(varied):
    data = varied()
    whole = list(data.loader(3))
    rest = data.loader(3, first_batch=4)
    assert len(rest) == len(whole) - 4
    for left, right in zip(whole[4:], rest, strict=True):
        same(left, right)
    assert list(data.loader(3, first_batch=len(whole))) == []


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_an_epoch_evenly(varied, world):
    data = varied()
    plan = data.plan(1)
    shares = [[batch.keys for batch in data.loader(1, rank=rank, world=world)] for rank in range(world)]
    assert {len(share) for share in shares} == {-(-len(plan) // world)}
    together = [share[turn] for turn in range(len(shares[0])) for share in shares]
    whole = [batch.keys for batch in data.loader(1)]
    assert together == (whole + whole)[: len(together)]


def test_the_loader_leaves_the_global_random_stream_alone(varied):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(varied().loader(1))
    assert torch.equal(torch.rand(1), expected)


def test_token_warmup_counts_optimizer_steps(tmp_path, draw, make_opts, traits):
    for number in range(4):
        draw(tmp_path / "1_x" / f"{number}.png", caption="a,b,c,d,e")
    opts = make_opts(
        gradient_accumulation_steps=2, train_data_dir=str(tmp_path), resolution="64", token_warmup_step=0.5
    )
    data = build_training_data(build_specs(opts, traits), opts, traits, 1)
    data.set_total_steps(8)  # warm-up over 4 steps, two epochs of two steps
    counts = [len(batch.captions[0].split(", ")) for epoch in (1, 2, 3) for batch in data.loader(epoch)]
    assert counts == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5, 5]


def test_sizes_crops_and_flips_as_formats_record_them(tmp_path, draw, load):
    path = draw(tmp_path / "1_x" / "a.png", (333, 500))
    options = {**BUCKETS, "resolution": "256", "bucket_reso_steps": 64, "max_bucket_reso": 512}
    data = load(tmp_path, flip_aug=True, **options)
    (record,) = data.records
    assert record.bucket == (192, 320)
    assert record.resized == (213, 320)
    image = images.resize(images.read_image(path), record.resized)[:, 10:202]  # overhang 21, the left half is 10
    seen = {}
    for epoch in range(1, 20):
        (batch,) = data.loader(epoch)
        flipped = not torch.equal(batch.pixels[0], images.to_pixels(image))
        assert not flipped or torch.equal(batch.pixels[0], images.to_pixels(image[:, ::-1]))
        seen[flipped] = batch.crop_top_lefts.tolist()
        assert batch.original_sizes.tolist() == [[333, 500]]
    # Letter box: height 192 / 0.666 = 288.29, top (320 - 288.29) // 2 = 15; both sides are touched.
    assert seen == {False: [[15, 0]], True: [[15, 0]]}


def test_flipped_crop_counts_from_the_other_side(tmp_path, draw, load):
    draw(tmp_path / "1_x" / "a.png", (640, 480))
    data = load(tmp_path, flip_aug=True, resolution="1024", enable_bucket=True, bucket_no_upscale=True)
    # The worked example 640x480 no_upscale: ltrb 21, 0, 618.333, 448 in a bucket 640 wide; 640 - 618.333 = 21.667.
    for epoch in range(1, 9):
        (batch,) = data.loader(epoch)
        assert batch.crop_top_lefts.tolist() == [[0, 21]]
        assert batch.target_sizes.tolist() == [[640, 448]]


@pytest.mark.rows("R38", "R41")
def test_without_buckets_sizes_must_match(tmp_path, draw, load):
    draw(tmp_path / "1_x" / "a.png", (64, 64))
    draw(tmp_path / "1_x" / "b.png", (64, 128))
    with pytest.raises(UserError, match=r"1 of 2 images do not have the size 64x64 \(the first is b.png, 64x128\)"):
        load(tmp_path)
    draw(tmp_path / "1_x" / "c.png", (63, 200))
    with pytest.raises(UserError, match=r"1 of 3 .* c.png"):
        load(tmp_path, random_crop=True)


def test_without_buckets_images_of_another_size_are_fitted_where_latents_are_cached(tmp_path, draw, load, caplog):
    """As the ancestor does. The cut is the one of a bucket of that size."""
    draw(tmp_path / "1_x" / "a.png", (64, 64))
    draw(tmp_path / "1_x" / "b.png", (64, 128))
    data = load(tmp_path, cache_latents=True)
    records = {record.path.name: record for record in data.records}
    assert {record.bucket for record in records.values()} == {(64, 64)}
    assert (records["a.png"].resized, records["b.png"].resized) == (None, (64, 128))
    pixels = render(records["b.png"], False, Random(0)).pixels
    assert np.array_equal(pixels, np.asarray(Image.open(tmp_path / "1_x" / "b.png"))[32:96])
    draw(tmp_path / "1_x" / "c.png", (200, 100))
    (record,) = (record for record in load(tmp_path, cache_latents=True).records if record.path.name == "c.png")
    assert record.resized == (128, 64)


def test_a_dataset_without_usable_images_is_left_out_while_others_remain(tmp_path, draw, make_opts, traits, warnings):
    good = draw(tmp_path / "good" / "a.png").parent
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "b.png").write_bytes(b"no image")
    datasets = [{"resolution": 64, "subsets": [{"image_dir": str(tmp_path / name)}]} for name in ("good", "bad")]
    config = tmp_path / "data.json"
    config.write_text(json.dumps({"datasets": datasets}))
    opts = make_opts(dataset_config=str(config))
    data = build_training_data(build_specs(opts, traits), opts, traits, 1)
    assert [record.path.parent for record in data.records] == [good]
    assert f"{tmp_path / 'bad'}: no usable training image; the dataset is left out" in warnings.text
    assert sum(len(batch.captions) for batch in data.loader(1)) == 1


def test_random_crop_without_buckets(tmp_path, draw, load):
    path = draw(tmp_path / "1_x" / "a.png", (66, 65))
    data = load(tmp_path, random_crop=True)
    image = images.to_pixels(images.read_image(path))
    corners = {(top, left): image[:, top : top + 64, left : left + 64] for top in range(2) for left in range(3)}
    seen = set()
    for epoch in range(1, 80):
        (batch,) = data.loader(epoch)
        seen |= {corner for corner, cut in corners.items() if torch.equal(cut, batch.pixels[0])}
        assert batch.crop_top_lefts.tolist() == [[0, 0]]
    assert seen == set(corners)


def test_face_crop_without_buckets(tmp_path, draw, load):
    draw(tmp_path / "1_x" / "a_b_100_60_20_20.png", (200, 120))
    data = load(tmp_path, face_crop_aug_range="2.0,4.0")
    sums = {next(iter(data.loader(epoch))).pixels.sum().item() for epoch in range(1, 5)}
    assert len(sums) == 4
    assert next(iter(data.loader(1))).pixels.shape == (1, 3, 64, 64)


@pytest.mark.rows("R224", "R245")
def test_one_folder_at_two_resolutions(tmp_path, draw, make_opts, write_config, traits):
    folder = draw(tmp_path / "p" / "a.png", (200, 200)).parent
    draw(folder / "b.png", (200, 200))
    datasets = [
        {
            "resolution": side,
            "batch_size": size,
            "enable_bucket": True,
            "subsets": [{"image_dir": str(folder), "class_tokens": "x"}],
        }
        for side, size in ((128, 2), (64, 1))
    ]
    file = write_config({"general": {"min_bucket_reso": 64}, "datasets": datasets})
    opts = make_opts(dataset_config=file)
    data = build_training_data(build_specs(opts, traits), opts, traits, 1)
    assert sorted(tuple(batch.pixels.shape) for batch in data.loader(1)) == [
        (1, 3, 64, 64),
        (1, 3, 64, 64),
        (2, 3, 128, 128),
    ]


def test_unreadable_images_are_named_and_left_out(tmp_path, draw, load):
    draw(tmp_path / "1_x" / "good.png")
    (tmp_path / "1_x" / "empty.png").write_bytes(b"")
    (tmp_path / "1_x" / "text.jpg").write_text("hello")
    cut = draw(tmp_path / "1_x" / "cut.jpg", (64, 64))
    cut.write_bytes(cut.read_bytes()[:-600])
    data = load(tmp_path)
    assert names(data) == [("good.png", 1)]
    left_out = [line for line in data.report() if line.startswith("left out: ")]
    assert [line.split(": ")[1].rsplit("/")[-1] for line in left_out] == ["cut.jpg", "empty.png", "text.jpg"]
    assert "truncated" in left_out[0]


def test_nothing_left(tmp_path, draw, load):
    draw(tmp_path / "a" / "1_x" / "tiny.png", (10, 10))
    with pytest.raises(UserError) as caught:
        load(tmp_path / "a", bucket_no_upscale=True, **BUCKETS)
    assert "no usable training image" in caught.value.problems[0]
    assert "10x10 is too small or too narrow" in caught.value.problems[1]


def test_an_image_that_breaks_later_is_named(tmp_path, draw, load):
    path = draw(tmp_path / "1_x" / "a.png")
    data = load(tmp_path)
    path.write_bytes(path.read_bytes()[:500])
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"a\.png: the image cannot be read") as caught:
            list(data.loader(1, workers=workers))
        assert "Traceback" not in str(caught.value)
    draw(path, (64, 128))
    with pytest.raises(UserError, match=r"a\.png: the image has changed"):
        list(data.loader(1))


def test_caption_problems_are_collected(tmp_path, draw, load):
    for name in ("a", "b"):
        draw(tmp_path / "1_x" / f"{name}.png")
        (tmp_path / "1_x" / f"{name}.caption").write_bytes(b"caf\xe9")
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert [line.split(":")[0].rsplit("/")[-1] for line in caught.value.problems] == ["a.caption", "b.caption"]


def test_txt_captions_under_the_default_extension(tmp_path, draw, load, warnings):
    draw(tmp_path / "1_x" / "a.png", caption="from txt", extension=".txt")
    assert load(tmp_path).records[0].caption == "from txt"
    assert "--caption_extension .txt" in warnings.text


def test_txt_files_beside_caption_files_are_not_passed_over_in_silence(tmp_path, draw, load, warnings):
    for name, extension in (("a", ".caption"), ("b", ".txt"), ("c", ".txt")):
        draw(tmp_path / "1_x" / f"{name}.png", caption=f"from {extension}", extension=extension)
    (tmp_path / "1_x" / "a.txt").write_text("tags of a", encoding="utf-8")  # both kinds: nothing is amiss
    assert [record.caption for record in load(tmp_path).records] == ["from .caption", "x", "x"]
    assert "2 of the images without .caption file have a .txt file, which is not read" in warnings.text


def test_report_shows_what_is_missing(tmp_path, draw, load, warnings):
    draw(tmp_path / "1_" / "a.png")
    draw(tmp_path / "1_" / "b.png", caption="")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "1_" / "c.png", exif=exif)
    draw(tmp_path / "2_y" / "d.png")
    lines = load(tmp_path).report()
    assert "1 image turned upright as their EXIF orientation says" in lines
    assert "2 images with neither a caption nor class tokens: they train on no text" in lines
    assert "1 image with an empty caption: they train on no text" in lines
    assert "1 image without a caption: their class tokens are the caption" in lines
    assert "2 images have neither" in warnings.text


def test_the_report_counts_no_image_that_is_left_out(tmp_path, draw, load, warnings):
    """Each damaged image has the header of a whole one, and something that is counted of whole ones."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, name in enumerate(("whole", "damaged")):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        folder = draw(tmp_path / "2_" / f"{name}.png", caption="").parent
        Image.fromarray(noise).save(folder / f"{name} turned.jpg", exif=exif, quality=95)
        draw(folder / f"{name} alone.png")
    for path in folder.glob("damaged*.*g"):
        path.write_bytes(path.read_bytes()[:-600])
    data = load(tmp_path, caption_extension=".caption")
    assert len(data.records) == 3
    lines = data.report()
    assert lines[0] == "dataset 1: 64x64, batch size 1: 3 images, 6 with repeats"
    assert f"  {folder}: 3 images x 2" in lines
    for line in (
        "1 image turned upright as their EXIF orientation says",
        "1 image with an empty caption: they train on no text",
        "2 images with neither a caption nor class tokens: they train on no text",
        "3 images left out",
    ):
        assert line in lines
    assert "2 images have neither" in warnings.text
    assert (data.num_train_images, data.batches_per_epoch) == (6, 6)


def test_an_epoch_has_a_largest_size(tmp_path, draw, load):
    """Its order is a list; with repeats, few images make a long one."""
    for number in range(21):
        draw(tmp_path / "1000000_x" / f"{number}.png", (16, 16))
    small = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 64}
    with pytest.raises(UserError) as caught:
        load(tmp_path, **small)
    (line,) = caught.value.problems
    assert line.startswith("an epoch would have 21,000,000 images with their repeats, more than 20,000,000; lower num_")


@pytest.mark.parametrize("name", ["1000001_x", "9" * 30 + "_x", "9" * 200 + "_x"])
def test_a_folder_has_a_largest_number_of_repeats(tmp_path, draw, load, name):
    draw(tmp_path / name / "a.png")
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    (line,) = caught.value.problems
    assert line == f"--train_data_dir: {tmp_path / name}: a folder may be repeated 1,000,000 times at most; rename it"


def test_what_workers_hold_is_small_and_picklable(tmp_path, draw, load):
    draw(tmp_path / "1_x" / "a.png")
    items = pickle.loads(pickle.dumps(load(tmp_path).items))
    assert isinstance(items, ItemDataset)
    assert items[ItemKey(1, 0, 0)].caption == "x"


def test_order_does_not_depend_on_the_file_system(tmp_path, draw, load, monkeypatch):
    import os

    for number in range(6):
        draw(tmp_path / "1_x" / f"{number}.png")
    expected = names(load(tmp_path))
    real = os.scandir

    class Shuffled:
        def __init__(self, path):
            with real(path) as entries:
                self.entries = list(entries)
            Random(3).shuffle(self.entries)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr("library.data.scan.folders.os.scandir", Shuffled)
    assert names(load(tmp_path)) == expected


@pytest.mark.rows("R504")
def test_offsets_of_timesteps_come_with_their_images(tmp_path, draw, make_opts, traits):
    """None where no subset of a batch has one, so that nothing is added."""
    for name in ("near", "far", "plain"):
        draw(tmp_path / name / f"{name}.png")
    lines = [
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path / name}'\n"
        + f"custom_attributes.timestep_sampling = {{ offset = {offset} }}\n" * (offset != 0)
        for name, offset in (("near", -0.5), ("far", 1), ("plain", 0))
    ]
    config = tmp_path / "data.toml"
    dataset = "[[datasets]]\nresolution = 64\nbatch_size = 3\n"
    config.write_text(dataset + "".join(lines) + dataset + lines[2])
    opts = make_opts(dataset_config=config)
    data = build_training_data(build_specs(opts, traits), opts, traits, 1)
    together, alone = sorted(data.loader(1), key=lambda batch: -len(batch.keys))
    by_name = {
        key.rpartition("/")[2]: offset for key, offset in zip(together.keys, together.timestep_offsets, strict=True)
    }
    assert by_name == {"near.png": -0.5, "far.png": 1.0, "plain.png": 0.0}
    assert alone.timestep_offsets is None


# ---- inpainting


def test_random_inpainting_masks_are_those_of_the_item_and_epoch(tmp_path, draw, load):
    """In any order and process, and with cached latents, beside which the pixels come too."""
    for name in ("a.png", "b.png"):
        draw(tmp_path / "2_x" / name)
    data = load(tmp_path, train_inpainting=True, flip_aug=True)
    first = data.items[ItemKey(1, 0, 2)]
    again = load(tmp_path, train_inpainting=True, flip_aug=True).items[ItemKey(1, 7, 2)]
    assert first.inpainting_mask.shape == (1, 64, 64)
    assert set(first.inpainting_mask.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(first.inpainting_mask, again.inpainting_mask)
    others = [ItemKey(2, 0, 2), ItemKey(1, 0, 3)]  # the same image in another epoch, and as another repeat
    assert not any(torch.equal(first.inpainting_mask, data.items[key].inpainting_mask) for key in others)
    cached = CachedInMemory()
    data.set_latents([cached] * 2, in_memory=True)
    beside = data.items[ItemKey(1, 0, 2)]
    assert torch.equal(beside.pixels, first.pixels)
    assert torch.equal(beside.inpainting_mask, first.inpainting_mask)
    assert beside.latents is cached.latents
    (batch,) = [b for b in data.loader(1, workers=0) if b.keys[0].endswith("a.png")][:1]
    assert batch.inpainting_masks.shape == (1, 1, 64, 64)


class CachedInMemory:
    latents = torch.zeros(4, 8, 8)

    def load(self, flip):
        return self.latents, None


@pytest.mark.parametrize("masked_loss", [False, True])
def test_masks_of_the_data_set_are_those_for_inpainting(tmp_path, draw, load, masked_loss):
    """Mirrored with the image; they weigh the loss only where that is asked for, and belong to caches only then."""
    draw(tmp_path / "train" / "1_x" / "a.png")
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[:, :20, 2] = 200  # bright in any channel
    mask[:, 20:24] = 100
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    options = {"conditioning_data_dir": str(tmp_path / "masks"), "masked_loss": masked_loss, "flip_aug": True}
    data = load(tmp_path / "train", train_inpainting=True, **options)
    seen = set()
    for epoch in range(1, 9):
        key = ItemKey(epoch, 0, 0)
        sample, columns = data.items[key], slice(44, 64) if data.items.is_mirrored_at(key) else slice(0, 20)
        seen.add(columns.start)
        expected = torch.zeros(1, 64, 64)
        expected[..., columns] = 1
        assert torch.equal(sample.inpainting_mask, expected)
        assert (sample.mask is not None) == masked_loss
    assert seen == {0, 44}
    assert [record.mask is not None for record in data.records] == [masked_loss]


def test_an_image_takes_about_a_kilobyte_and_a_half(tmp_path, draw, load, monkeypatch):
    """Of a warm start, with a caption each: what is held in the end, so that a million images fit in memory."""
    monkeypatch.setattr(near_duplicates, "MOST", 100)  # as of many images, which are not compared by their looks
    count, folder = 500, tmp_path / "data" / "1_a"
    content = draw(folder / "000.png").read_bytes()
    for number in range(count):
        (folder / f"{number:03d}.png").write_bytes(content + b"%d" % number)
        (folder / f"{number:03d}.txt").write_text(f"a photo of a house on a hill, number {number}", encoding="utf-8")
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))  # what is new may change once more, and is not kept
    options = {"data_index_dir": str(tmp_path / "index"), "caption_extension": ".txt"}
    load(folder.parent, **options)
    gc.collect()
    tracemalloc.start()
    try:
        data = load(folder.parent, **options)
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(data.records) == count
    assert 500 < held / count < 1600  # paths are long here
