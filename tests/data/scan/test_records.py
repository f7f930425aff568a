"""Images that `skip_image_resolution` leaves out: by their area, before buckets, validation and balancing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from library.data.config.blueprint import build_specs
from library.data.sample.dataset import build_training_data
from library.errors import UserError

SIZES = {"large.png": (128, 128), "square.png": (96, 96), "small.png": (64, 64), "wide.png": (128, 64)}
BUCKETS = {"enable_bucket": True, "min_bucket_reso": 64, "bucket_no_upscale": True, "resolution": "128"}


@pytest.fixture
def folder(tmp_path, draw):
    for name, size in SIZES.items():
        draw(tmp_path / "train" / "1_cat" / name, size, caption=name)
    return tmp_path / "train"


@pytest.fixture
def load(make_opts, traits):
    def build(**given):
        opts = make_opts(**given)
        return build_training_data(build_specs(opts, traits), opts, traits, 1)

    return build


def names(data, dataset=0):
    return sorted(record.path.name for record in data.records if record.dataset == dataset)


@pytest.mark.rows("R501")
@pytest.mark.parametrize(
    ("least", "left"),
    [
        ("63", ["large.png", "small.png", "square.png", "wide.png"]),
        ("64", ["large.png", "square.png", "wide.png"]),  # no more than 64 x 64, not less
        ("32,256", ["large.png", "square.png"]),  # the area counts, not the sides
        ("96,96", ["large.png"]),
        ("0", ["large.png", "small.png", "square.png", "wide.png"]),
    ],
)
def test_images_with_no_more_pixels_are_left_out(folder, load, least, left):
    data = load(train_data_dir=str(folder), skip_image_resolution=least, **BUCKETS)
    assert names(data) == left
    sizes = [f"{side}x{side}" for side in [least] if "," not in side] or [least.replace(",", "x")]
    count = len(SIZES) - len(left)
    line = f"  {count} image{'' if count == 1 else 's'} skipped, with no more pixels than {sizes[0]}"
    assert (line in data.report()) == (count > 0)
    assert not data.scan.dropped  # so --strict does not stop


@pytest.mark.rows("R501")
def test_datasets_of_one_folder_skip_on_their_own(folder, load, write_config, tmp_path):
    """The use it was made for: small images are not repeated at every size. Files of infos hold all of them."""
    subset = {"image_dir": str(folder / "1_cat"), "cache_info": True}
    config = {
        "general": {"enable_bucket": True, "min_bucket_reso": 64, "bucket_no_upscale": True},
        "datasets": [
            {"resolution": 128, "skip_image_resolution": [96, 96], "subsets": [subset]},
            {"resolution": 96, "subsets": [subset]},
        ],
    }
    for _ in range(2):  # the second time from the file of infos
        data = load(dataset_config=write_config(config), skip_image_resolution="64")
        assert (names(data), names(data, 1)) == (["large.png"], ["large.png", "square.png", "wide.png"])
        first, second = json.loads(data.metadata()["ss_datasets"])
        assert (first["skip_image_resolution"], second["skip_image_resolution"]) == ([96, 96], [64, 64])
        assert first["resize_interpolation"] is None
    assert len(json.loads((folder / "1_cat" / "metadata_cache.json").read_text())) == len(SIZES)


@pytest.mark.rows("R501")
def test_a_metadata_file_and_latents_without_images(folder, load, tmp_path):
    """The size of an image that is gone stands in the name of its latents."""
    np.savez(folder / "1_cat" / "gone_0072x0064_test.npz", latents=np.ones((4, 8, 8), np.float32))
    entries = {name: {"caption": name} for name in [*SIZES, "gone"]}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    given = {"in_json": str(tmp_path / "meta.json"), "train_data_dir": str(folder / "1_cat"), **BUCKETS}
    assert names(load(**given))[0] == "gone"
    assert names(load(**given, skip_image_resolution="72,64"))[0] == "large.png"


@pytest.mark.rows("R501")
def test_regularisation_is_balanced_and_validation_chosen_from_what_is_left(folder, load, draw, tmp_path):
    draw(tmp_path / "reg" / "1_cat" / "r.png", (128, 128))
    draw(tmp_path / "reg" / "1_cat" / "tiny.png", (32, 32))
    given = {"train_data_dir": str(folder), "reg_data_dir": str(tmp_path / "reg"), "skip_image_resolution": "64"}
    data = load(**given, **BUCKETS)
    assert [(one.path.name, one.repeats) for one in data.records if one.subset.is_reg] == [("r.png", 3)]
    (held,) = load(**given, **BUCKETS, validation_split=1.0 / 3, validation_seed=1).held_out.records
    assert held.path.name in ("large.png", "square.png", "wide.png")


def test_without_buckets_a_skipped_image_is_of_no_wrong_size(folder, load):
    assert names(load(train_data_dir=str(folder), resolution="128", skip_image_resolution="96")) == ["large.png"]


def test_mistakes(folder, load, write_config):
    with pytest.raises(UserError, match=r"--skip_image_resolution: must be one number or width,height.*'64x64'"):
        load(train_data_dir=str(folder), skip_image_resolution="64x64", **BUCKETS)
    subset = {"image_dir": str(folder / "1_cat"), "skip_image_resolution": 64}
    with pytest.raises(UserError, match=r"it belongs in \[general\] or \[\[datasets\]\]"):
        load(dataset_config=write_config({"datasets": [{"resolution": 64, "subsets": [subset]}]}))
    with pytest.raises(UserError) as caught:
        load(train_data_dir=str(folder), skip_image_resolution="512", **BUCKETS)
    assert caught.value.problems[-1] == "4 have no more pixels than skip_image_resolution"
