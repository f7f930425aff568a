"""The report and the ss_* metadata of the data."""

from __future__ import annotations

import json

import pytest

from library.data.config.blueprint import build_specs
from library.data.sample.dataset import build_training_data

BUCKETS = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 256}


@pytest.fixture
def folders(tmp_path, draw):
    """Two training folders and a regularisation folder; one name occurs on both sides."""
    draw(tmp_path / "train" / "2_cat" / "a.png", (100, 100), caption="Cat, cat , sitting,")
    draw(tmp_path / "train" / "2_cat" / "b.png", (300, 100), caption="cat")
    draw(tmp_path / "train" / "1_dog" / "c.png", (130, 128))
    draw(tmp_path / "reg" / "1_dog" / "r.png", (64, 64))
    return tmp_path


@pytest.mark.rows("R54", "R55")
def test_report_counts(folders, make_opts, traits):
    opts = make_opts(
        train_data_dir=str(folders / "train"),
        reg_data_dir=str(folders / "reg"),
        resolution="128",
        train_batch_size=2,
        **BUCKETS,
    )
    data = build_training_data(build_specs(opts, traits), opts, traits, 1)
    assert data.report()[:7] == [
        "dataset 1: 128x128, batch size 2: 3 images, 5 with repeats; 1 for regularisation, 5 with repeats",
        f"  {folders}/train/1_dog: 1 images x 1",
        f"  {folders}/train/2_cat: 2 images x 2",
        f"  {folders}/reg/1_dog (regularisation): 1 images x 1",
        "  bucket 128x128: 8 images with repeats",
        "  bucket 192x64: 2 images with repeats",
        # of 130x128 pixels two columns go; nothing of a, b and r
        f"  cropping takes {100 * 2 / 130 / 4:.1f} % of an image on average, at most {100 * 2 / 130:.1f} % (c.png)",
    ]


def test_metadata_of_folders(folders, make_opts, traits):
    opts = make_opts(
        train_data_dir=str(folders / "train"),
        reg_data_dir=str(folders / "reg"),
        resolution="128",
        train_batch_size=2,
        **BUCKETS,
    )
    found = build_training_data(build_specs(opts, traits), opts, traits, 1).metadata(processes=3)
    assert found["ss_resolution"] == "(128, 128)"
    assert (found["ss_batch_size_per_device"], found["ss_total_batch_size"]) == (2, 6)
    assert (found["ss_num_train_images"], found["ss_num_reg_images"], found["ss_num_batches_per_epoch"]) == (5, 5, 5)
    assert json.loads(found["ss_dataset_dirs"]) == {
        "1_dog": {"n_repeats": 1, "img_count": 1},
        "2_cat": {"n_repeats": 2, "img_count": 2},
    }
    assert json.loads(found["ss_reg_dataset_dirs"]) == {"1_dog": {"n_repeats": 1, "img_count": 1}}
    assert json.loads(found["ss_tag_frequency"]) == {"1_dog": {"dog": 2}, "2_cat": {"cat": 2, "sitting": 1}}
    info = json.loads(found["ss_bucket_info"])
    assert info["buckets"] == {
        "0": {"resolution": [128, 128], "count": 8},
        "1": {"resolution": [192, 64], "count": 2},
    }
    assert info["mean_img_ar_error"] == pytest.approx((130 / 128 - 1) / 4)
    assert "ss_datasets" not in found


def test_metadata_of_a_config(folders, make_opts, write_config, traits):
    cat = {"image_dir": str(folders / "train" / "2_cat"), "num_repeats": 3, "keep_tokens": 1, "class_tokens": "x"}
    reg = {"image_dir": str(folders / "reg" / "1_dog"), "is_reg": True}
    datasets = [{"resolution": side, "subsets": [cat, reg] if side == 128 else [cat]} for side in (128, 64)]
    opts = make_opts(dataset_config=write_config({"datasets": datasets}), **BUCKETS)
    found = build_training_data(build_specs(opts, traits), opts, traits, 1).metadata()
    first, second = json.loads(found["ss_datasets"])
    assert (first["resolution"], second["resolution"]) == ([128, 128], [64, 64])
    assert (first["num_train_images"], first["num_reg_images"], second["num_reg_images"]) == (6, 6, 0)
    assert [subset["is_reg"] for subset in first["subsets"]] == [False, True]
    assert (
        first["subsets"][0] | {"img_count": 2, "num_repeats": 3, "keep_tokens": 1, "image_dir": "2_cat"}
        == first["subsets"][0]
    )
    assert first["tag_frequency"]["2_cat"] == {"cat": 2, "sitting": 1}
    assert json.loads(found["ss_tag_frequency"])["2_cat"] == {"cat": 2, "sitting": 1}  # not once per resolution
    assert json.loads(found["ss_dataset_dirs"]) == {
        "2_cat": {"n_repeats": 3, "img_count": 2},
        "2_cat (2)": {"n_repeats": 3, "img_count": 2},
    }
    assert "ss_resolution" not in found
