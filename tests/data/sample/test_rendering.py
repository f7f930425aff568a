"""What the model is to see of a record: the same cut for the image, its transparency and its mask."""

from __future__ import annotations

from pathlib import Path
from random import Random
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from library.data.sample import buckets, images
from library.data.sample.rendering import View, loss_mask, recorded_crop, render, render_control, to_mask
from library.errors import UserError
from library.types import Size

SUBSET = {
    "alpha_mask": False,
    "color_aug": False,
    "face_crop_aug_range": None,
    "random_crop": False,
    "resize_interpolation": None,
}


def record(path: Path, size, bucket, resized, mask=None, control=None, **subset):
    assert subset.keys() <= SUBSET.keys()
    return SimpleNamespace(
        path=path,
        size=Size(*size),
        bucket=Size(*bucket),
        resized=None if resized is None else Size(*resized),
        mask=mask,
        control=control,
        inpainting_mask=None,
        subset=SimpleNamespace(**{**SUBSET, **subset}),
    )


def places(width, height):
    """Every pixel tells where it lies: column in red, row in green."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x, y, np.full_like(x, 77)], axis=-1).astype(np.uint8)


@pytest.fixture
def scene(tmp_path):
    """(image, mask) of 120x80; opacity and mask tell columns and rows too, so that cuts can be compared."""
    image, mask = tmp_path / "a.png", tmp_path / "mask.png"
    colours = places(120, 80)
    opacity = 255 - colours[..., 0]
    Image.fromarray(np.dstack([colours, opacity])).save(image)
    Image.fromarray(colours).save(mask)
    return image, mask


def test_image_in_the_middle(scene):
    resized = np.asarray(images.resize(images.read_image(scene[0]), Size(96, 64)))
    view = render(record(scene[0], (120, 80), (64, 64), (96, 64)), False, Random(0))
    assert np.array_equal(view.pixels, resized[:, 16:80])
    assert view[1:] == (None, None, None, None)


@pytest.mark.parametrize("kept_whole", [{}, {"resize_interpolation": "lanczos"}, {"alpha_mask": True}])
def test_a_photo_that_is_shrunk_far_may_be_decoded_small(tmp_path, kept_whole, monkeypatch):
    """Within one level of 255 on average; where the options ask for more than an area's mean, it is decoded whole."""
    rng = np.random.default_rng(0)
    image = rng.normal(127, 3, size=(1200, 1600, 3))
    for columns, strength in ((6, 50), (24, 25), (96, 12)):
        grid = rng.normal(size=(columns * 3 // 4, columns, 3)) * strength
        image += cv2.resize(grid, (1600, 1200), interpolation=cv2.INTER_CUBIC)
    path = tmp_path / "photo.jpg"
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    cut = images.centre_crop(Size(128, 96), Size(96, 96))
    expected = images.apply_crop(images.read_image(path), cut, kept_whole.get("resize_interpolation"))
    view = render(record(path, (1600, 1200), (96, 96), (128, 96), **kept_whole), False, Random(0))
    difference = np.abs(view.pixels.astype(int) - expected)
    assert difference.mean() < 1
    assert difference.any() == (not kept_whole)
    assert images.read_reduced(path, lambda _: Size(512, 384))[0].shape == (600, 800, 3)


def test_colours_behind_transparency_show_only_with_alpha_mask(scene):
    plain = render(record(scene[0], (120, 80), (120, 80), (120, 80)), False, Random(0))
    weighted = render(record(scene[0], (120, 80), (120, 80), (120, 80), alpha_mask=True), False, Random(0))
    assert np.array_equal(weighted.pixels, places(120, 80))
    assert np.array_equal(weighted.alpha, 255 - places(120, 80)[..., 0])
    assert np.array_equal(plain.pixels, images.read_image(scene[0]))
    assert plain.pixels[0, 119, 0] > weighted.pixels[0, 119, 0]  # white shines through


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("cut", ["centre", "random", "face", "face anywhere"])
def test_all_parts_have_the_same_cut(scene, tmp_path, cut, flip):
    image, mask = scene
    subset = {"alpha_mask": True, "random_crop": cut in ("random", "face anywhere"), "resize_interpolation": "area"}
    resized = (120, 80)
    if cut.startswith("face"):
        subset["face_crop_aug_range"], resized = (1.5, 3.0), None
        image = image.rename(tmp_path / "a_70_30_12_16.png")
    corners = set()
    for seed in range(20):
        one = record(image, (120, 80), (48, 40), resized, mask, mask, **subset)
        view = render(one, flip, Random(seed))
        assert view.pixels.shape == view.mask.shape == (40, 48, 3)
        assert view.alpha.shape == (40, 48)
        assert np.array_equal(view.pixels, view.mask)
        assert np.array_equal(view.pixels, view.control)
        assert np.abs(255 - view.alpha.astype(int) - view.pixels[..., 0]).max() <= 1  # area rounds both
        steps = np.diff(view.pixels[0, :, 0].astype(int))
        assert (steps <= 0).all() if flip else (steps >= 0).all()
        corners.add(view.pixels[0, 0].tobytes())
    assert (len(corners) == 1) == (cut == "centre")


def test_mask_of_another_size_lies_over_the_whole_image(scene, tmp_path):
    image, _ = scene
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 10:20] = 255  # the middle third of 120 columns, the middle half of 80 rows
    Image.fromarray(mask).save(tmp_path / "small.png")
    view = render(record(image, (120, 80), (80, 80), (120, 80), tmp_path / "small.png"), False, Random(0))
    assert (view.mask[24:56, 24:56] == 255).all()  # 20 columns are cut off on the left
    assert (view.mask[:, :16] == 0).all()
    assert (view.mask[:, 64:] == 0).all()
    assert (view.mask[:16] == 0).all()
    assert (view.mask[64:] == 0).all()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("resized", [(96, 64), None])
def test_a_control_image_alone_is_as_beside_its_image_and_no_mask(scene, flip, resized):
    """As with cached latents, where the image is not read at all."""
    image, partner = scene
    one = record(image, (120, 80), (64, 64), resized, control=partner)
    view = render(one, flip, Random(3))
    assert loss_mask(view) is None
    image.unlink()
    assert np.array_equal(render_control(one, flip), view.control)
    assert render_control(record(image, (120, 80), (64, 64), resized), flip) is None


def test_random_draws(scene):
    """Left and then top, and the colours after them: seeds give the cuts that they always gave."""
    for seed in range(20):
        rng = Random(seed)
        left, top = rng.randint(0, 72), rng.randint(0, 40)
        view = render(record(scene[1], (120, 80), (48, 40), (120, 80), random_crop=True), False, Random(seed))
        assert view.pixels[0, 0].tolist() == [left, top, 77]
        expected = images.vary_colours(view.pixels, rng)
        both = record(scene[1], (120, 80), (48, 40), (120, 80), random_crop=True, color_aug=True)
        assert np.array_equal(render(both, False, Random(seed)).pixels, expected)


def test_colours_vary_in_the_image_alone(scene):
    changed = 0
    for seed in range(30):
        views = [
            render(
                record(scene[0], (120, 80), (64, 64), (96, 64), scene[1], alpha_mask=True, color_aug=aug), False, rng
            )
            for aug, rng in ((False, Random(seed)), (True, Random(seed)))
        ]
        assert np.array_equal(views[0].alpha, views[1].alpha)
        assert np.array_equal(views[0].mask, views[1].mask)
        changed += not np.array_equal(views[0].pixels, views[1].pixels)
    assert 3 < changed < 20


def test_image_without_transparency_counts_everywhere(scene):
    view = render(record(scene[1], (120, 80), (64, 64), (96, 64), alpha_mask=True), True, Random(0))
    assert (view.alpha == 255).all()


def test_face_in_the_name_is_for_images_without_buckets(scene, tmp_path):
    path = scene[1].rename(tmp_path / "a_100_60_12_16.png")
    bucketed = record(path, (120, 80), (48, 40), (120, 80), face_crop_aug_range=(1.5, 3.0))
    assert render(bucketed, False, Random(0)).pixels[0, 0].tolist() == [36, 20, 77]


def test_unreadable_files_are_named(scene, tmp_path):
    image, mask = scene
    whole = mask.read_bytes()
    mask.write_bytes(whole[:-60])
    with pytest.raises(UserError, match=r"mask\.png: the image cannot be read \(the file is truncated\)"):
        render(record(image, (120, 80), (120, 80), None, mask), False, Random(0))
    assert mask.read_bytes() == whole[:-60]
    with pytest.raises(UserError, match=r"gone\.png: the image cannot be read \(No such file or directory\)"):
        render(record(tmp_path / "gone.png", (120, 80), (120, 80), None), False, Random(0))


def test_image_of_another_size_than_recorded(scene):
    for alpha_mask in (False, True):
        one = record(scene[0], (80, 120), (64, 64), (64, 96), alpha_mask=alpha_mask)
        with pytest.raises(UserError, match=r"a\.png: the image has changed .* from 80x120 to 120x80"):
            render(one, False, Random(0))


def test_files_stay_as_they_are(scene):
    before = [path.read_bytes() for path in scene]
    render(record(scene[0], (120, 80), (64, 64), (96, 64), scene[1], alpha_mask=True, color_aug=True), True, Random(1))
    assert [path.read_bytes() for path in scene] == before


def test_recorded_crop(scene):
    one = record(scene[0], (120, 80), (64, 64), (96, 64))
    left, top, right, _ = buckets.crop_ltrb(Size(64, 64), Size(120, 80))
    assert recorded_crop(one, False) == (int(top), int(left))
    assert recorded_crop(one, True) == (int(top), int(64 - right))
    assert recorded_crop(record(scene[0], (120, 80), (64, 64), None), True) == (0, 0)  # no bucket: nothing was added


def test_to_mask():
    plane = np.array([[0, 128, 255], [51, 102, 204]], np.uint8)
    mask = to_mask(plane[:, ::-1])
    assert mask.dtype == torch.float32
    assert mask.shape == (1, 2, 3)
    assert mask[0].tolist() == [pytest.approx([1, 128 / 255, 0]), pytest.approx([0.8, 0.4, 0.2])]
    assert np.array_equal(plane, [[0, 128, 255], [51, 102, 204]])


def test_loss_mask():
    pixels = np.zeros((1, 3, 3), np.uint8)
    alpha = np.array([[255, 51, 102]], np.uint8)
    extra = np.array([[[255, 0, 9], [255, 1, 9], [0, 255, 9]]], np.uint8)
    assert loss_mask(View(pixels, None, None, None)) is None
    assert loss_mask(View(pixels, alpha, None, None)).tolist() == [[pytest.approx([1, 0.2, 0.4])]]
    assert loss_mask(View(pixels, None, extra, None)).tolist() == [[pytest.approx([1, 1, 0])]]  # the red channel
    assert loss_mask(View(pixels, alpha, extra, None)).tolist() == [[pytest.approx([1, 0.2, 0])]]
