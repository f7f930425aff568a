"""Validation splits: never on both sides, stable, and plain."""

from __future__ import annotations

import shutil

import pytest

from library.data.config.blueprint import build_specs
from library.data.sample.dataset import build_training_data


@pytest.fixture
def load(make_opts, traits, write_config):
    """TrainingData of a dataset config."""

    def build(config, seed=1, **options):
        opts = make_opts(dataset_config=write_config(config), **options)
        return build_training_data(build_specs(opts, traits), opts, traits, seed)

    return build


def table(folder, **dataset):
    subset = dataset.pop("subset", {})
    return {"resolution": 64, "subsets": [{"image_dir": str(folder), "class_tokens": "x", **subset}], **dataset}


def paths(data):
    return {record.path for record in data.records}


@pytest.fixture
def folder(tmp_path, draw):
    for number in range(10):
        draw(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


@pytest.mark.parametrize(("split", "held"), [(0.01, 1), (0.1, 1), (0.14, 1), (0.15, 2), (0.25, 3), (0.5, 5), (0.9, 9)])
def test_counts_are_rounded_and_nothing_is_on_both_sides(folder, load, split, held):
    data = load({"datasets": [table(folder, validation_split=split)]})
    assert (len(data.records), len(data.held_out.records)) == (10 - held, held)
    assert not paths(data) & paths(data.held_out)
    assert data.metadata()["ss_num_validation_images"] == held
    assert f"held out for validation: {held} images" in data.report()


def test_no_split_holds_nothing_out(folder, load):
    data = load({"datasets": [table(folder)]})
    assert data.held_out is None
    assert len(data.records) == 10


def test_the_choice_follows_the_seed_and_the_names(folder, load, tmp_path, draw):
    config = {"datasets": [table(folder, validation_split=0.4)]}
    first = paths(load(config).held_out)
    assert paths(load(config).held_out) == first
    assert paths(load(config, seed=2).held_out) != first
    own = {"datasets": [table(folder, validation_split=0.4, validation_seed=7)]}
    assert paths(load(own).held_out) == paths(load(own, seed=2).held_out)
    moved = tmp_path / "elsewhere" / "images"
    shutil.copytree(folder, moved)
    again = paths(load({"datasets": [table(moved, validation_split=0.4)]}).held_out)
    assert {path.name for path in again} == {path.name for path in first}


def test_the_same_folder_at_two_resolutions_is_split_alike(folder, load):
    tables = [table(folder, validation_split=0.3), table(folder, resolution=128, enable_bucket=True)]
    data = load({"general": {"min_bucket_reso": 64}, "datasets": tables})
    assert len(data.held_out.records) == 3  # the second dataset validates nothing
    assert len(data.records) == 14  # and must not train on what the first holds out
    assert not paths(data) & paths(data.held_out)


def test_copies_are_on_the_same_side(folder, load):
    for number in range(10):
        shutil.copy(folder / f"{number}.png", folder / f"copy of {number}.png")
    data = load({"datasets": [table(folder, validation_split=0.3)]})

    def originals(one):
        return {path.name.removeprefix("copy of ") for path in paths(one)}

    assert not originals(data) & originals(data.held_out)
    assert len(data.held_out.records) == 6


def test_regularisation_images_are_not_held_out_and_balance_what_is_trained(folder, load, tmp_path, draw):
    for number in range(10):
        draw(tmp_path / "reg" / f"r{number}.png")
    one = table(folder, validation_split=0.4)
    one["subsets"].append({"image_dir": str(tmp_path / "reg"), "is_reg": True, "class_tokens": "y"})
    data = load({"datasets": [one]})
    assert not any(record.subset.is_reg for record in data.held_out.records)
    assert data.num_train_images == data.num_reg_images == 6


def test_what_is_held_out_is_seen_plain_and_once(folder, load, draw):
    for number in range(10):
        (folder / f"{number}.caption").write_text("a, b, c, d, e")
    subset = {
        "num_repeats": 3,
        "flip_aug": True,
        "color_aug": True,
        "shuffle_caption": True,
        "caption_dropout_rate": 0.9,
    }
    data = load({"datasets": [table(folder, validation_split=0.3, subset=subset)]})
    assert [record.repeats for record in data.held_out.records] == [1, 1, 1]
    first, second = (list(data.held_out.loader(epoch)) for epoch in (1, 2))
    pixels = {batch.keys[0]: batch.pixels for batch in first}
    assert len(pixels) == 3
    for batch in second:
        assert batch.captions == ["a, b, c, d, e"]
        assert (batch.pixels == pixels[batch.keys[0]]).all()
