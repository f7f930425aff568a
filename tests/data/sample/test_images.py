"""Decoding of real files of every kind, and what is done to their pixels."""

from __future__ import annotations

import logging
import os
import re
import struct
import subprocess
import sys
import zlib
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from random import Random

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, features

from library.data.sample import images
from library.data.scan import duplicates
from library.types import Size

ROOT = Path(__file__).resolve().parents[3]


def gradient(width=40, height=24):
    """A smooth image that looks different in every orientation; smooth, so that JPEG changes little."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / (width - 1), y * 255 / (height - 1), (x + y) * 2], axis=-1).astype(np.uint8)


def close(actual, expected, tolerance):
    difference = np.abs(actual.astype(int) - expected.astype(int))
    return actual.shape == expected.shape and difference.max() <= tolerance


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.Png", "a.bmp", "a.webp", "a.jpg", "a.JPEG"])
def test_formats(tmp_path, name):
    lossless = name.lower().endswith(("png", "bmp", "webp"))
    Image.fromarray(gradient()).save(tmp_path / name, **({"lossless": True} if "webp" in name else {"quality": 100}))
    assert close(images.read_image(tmp_path / name), gradient(), 0 if lossless else 8)
    assert images.probe(tmp_path / name) == (Size(40, 24), False, 1)


# How a viewer must turn the stored pixels, from the EXIF standard: row 0 and column 0 of the stored image are ...
UPRIGHT = {
    1: lambda a: a,  # top, left
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.transpose(1, 0, 2),  # left, top
    6: lambda a: np.rot90(a, -1),  # right, top
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
    8: lambda a: np.rot90(a),  # left, bottom
}


@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_exif_orientation(tmp_path, orientation, suffix):
    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = (
        {"lossless": True} if suffix == ".webp" else {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}
    )
    Image.fromarray(gradient()).save(path, exif=exif, **options)
    expected = UPRIGHT.get(orientation, UPRIGHT[1])(gradient())
    assert close(images.read_image(path), expected, 8 if suffix == ".jpg" else 0)
    assert images.image_size(path) == (expected.shape[1], expected.shape[0])
    assert images.probe(path).turned == (orientation in range(2, 9))


def test_16_bit_grey_keeps_its_shades(tmp_path):
    values = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), values)
    expected = np.repeat(np.round(values / 257)[..., None], 3, axis=-1)
    assert close(images.read_image(tmp_path / "a.png"), expected, 0)


def test_16_bit_grey_sideways_and_transparent(tmp_path):
    values = (np.arange(24 * 40, dtype=np.uint16) * 60).reshape(24, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif, transparency=0)
    expected = np.rot90(np.where(values == 0, 255, np.round(values / 257)), -1)
    assert close(images.read_image(tmp_path / "a.png")[..., 0], expected, 0)


def test_16_bit_colour(tmp_path):
    values = gradient().astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "a.png"), values[..., ::-1])
    assert close(images.read_image(tmp_path / "a.png"), gradient(), 1)  # Pillow keeps the high byte


def test_grey_palette_and_one_bit(tmp_path):
    grey = gradient()[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert close(images.read_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, axis=-1), 0)
    palette = Image.fromarray(gradient()).quantize(16)
    palette.save(tmp_path / "palette.png")
    assert close(images.read_image(tmp_path / "palette.png"), np.asarray(palette.convert("RGB")), 0)
    Image.fromarray(grey > 128).save(tmp_path / "bit.png")
    assert close(images.read_image(tmp_path / "bit.png")[..., 0], np.where(grey > 128, 255, 0), 0)


def test_cmyk_jpeg(tmp_path):
    cmyk = np.zeros((24, 40, 4), np.uint8)
    cmyk[..., 1:3] = 255  # magenta and yellow ink make red
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "a.jpg", quality=100)
    assert close(images.read_image(tmp_path / "a.jpg"), np.broadcast_to(np.array([255, 0, 0]), (24, 40, 3)), 4)


@pytest.mark.parametrize(("mode", "suffix"), [("RGBA", ".png"), ("RGBA", ".webp"), ("LA", ".png")])
def test_transparency_becomes_white(tmp_path, mode, suffix):
    alpha = np.zeros((24, 40), np.uint8)
    alpha[:, 10:20], alpha[:, 20:] = 128, 255
    colours = gradient() if mode == "RGBA" else gradient()[..., :1]
    array = np.concatenate([colours, alpha[..., None]], axis=-1)
    Image.fromarray(array, mode).save(tmp_path / f"a{suffix}", lossless=True, exact=True)
    share = alpha[..., None] / 255
    expected = np.broadcast_to(np.round(colours * share + 255 * (1 - share)), (24, 40, 3))
    actual = images.read_image(tmp_path / f"a{suffix}")
    assert close(actual, expected, 1)  # Pillow composites in integers
    assert (actual[:, :10] == 255).all()  # the hidden colours do not show


def test_palette_and_grey_with_a_transparent_colour(tmp_path):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "palette.png", transparency=0)
    image = images.read_image(tmp_path / "palette.png")
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[0, 1].tolist() == [0, 0, 255]
    grey = Image.new("L", (8, 8), 10)
    grey.putpixel((0, 0), 99)
    grey.save(tmp_path / "grey.png", transparency=99)
    assert images.read_image(tmp_path / "grey.png")[0, :2, 0].tolist() == [255, 10]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
def test_truncated_files_are_found_from_the_outside(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    Image.fromarray(noise).save(path)
    assert images.image_size(path) == (300, 200)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises((OSError, ValueError)):
        images.probe(path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 20])
def test_no_image_at_all(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        images.probe(tmp_path / "a.png")


def test_data_behind_the_image_does_no_harm(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(gradient()).save(path)
    path.write_bytes(path.read_bytes() + b"\0" * 5000)  # as some phones do
    assert images.image_size(path) == (40, 24)


def test_size_comes_from_the_header_alone(tmp_path, monkeypatch):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    Image.fromarray(gradient()).save(tmp_path / "a.jpg")

    def decode(self):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    assert images.image_size(tmp_path / "a.png") == images.image_size(tmp_path / "a.jpg") == (40, 24)


@pytest.mark.rows("R50")
def test_default_resizing(tmp_path):
    source = np.random.default_rng(1).integers(0, 256, (24, 40, 3), np.uint8)
    for to in (Size(20, 12), Size(40, 13)):
        assert np.array_equal(images.resize(source, to), cv2.resize(source, to, interpolation=cv2.INTER_AREA))
    for to in (Size(80, 48), Size(41, 12)):
        lanczos = np.asarray(Image.fromarray(source).resize(to, Image.Resampling.LANCZOS))
        assert np.array_equal(images.resize(source, to), lanczos)
    blocks = source.astype(float).reshape(12, 2, 20, 2, 3).mean(axis=(1, 3))
    assert close(images.resize(source, Size(20, 12)), blocks, 1)  # area is the mean of 2x2 pixels


@pytest.mark.parametrize("name", ["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"])
def test_chosen_interpolation(name):
    source = gradient()
    assert images.resize(source, Size(20, 12), name).shape == (12, 20, 3)
    assert images.resize(source, Size(80, 48), name).shape == (48, 80, 3)
    assert np.array_equal(images.resize(source, Size(40, 24), name), source)


def test_centre_and_random_crops():
    assert images.centre_crop(Size(40, 24), Size(37, 20)) == (Size(40, 24), 1, 2, Size(37, 20))
    places = {images.random_crop(Size(40, 24), Size(38, 23), Random(seed))[1:3] for seed in range(300)}
    assert places == {(left, top) for left in range(3) for top in range(2)}
    assert images.random_crop(Size(40, 24), Size(40, 24), Random(0)) == images.centre_crop(Size(40, 24), Size(40, 24))


def test_apply_crop():
    source = gradient()
    cut = images.Crop(Size(40, 24), 1, 2, Size(37, 20))
    assert np.array_equal(images.apply_crop(source, cut), source[2:22, 1:38])
    assert np.array_equal(images.apply_crop(source[..., 0], cut), source[2:22, 1:38, 0])
    cut = images.Crop(Size(20, 12), 3, 1, Size(16, 8))
    resized = images.resize(source, Size(20, 12), "bicubic")
    assert np.array_equal(images.apply_crop(source, cut, "bicubic"), resized[1:9, 3:19])


@pytest.mark.parametrize("resized", [Size(20, 12), Size(80, 48), Size(20, 48)])
def test_masks_are_cut_as_images_are_and_make_no_new_values(resized):
    mask = np.zeros((24, 40), np.uint8)
    mask[6:18, 10:30] = 200
    cut = images.Crop(resized, resized.width // 4, resized.height // 4, Size(resized.width // 2, resized.height // 2))
    inside = images.apply_crop_to_values(mask, cut)
    assert inside.shape == (cut.to.height, cut.to.width)
    assert (inside[1:-1, 1:-1] == 200).all()  # the bright part is just what is cut out; its edges may mix
    noise = np.where(np.random.default_rng(2).random((24, 40)) < 0.5, 50, 200).astype(np.uint8)
    whole = images.apply_crop_to_values(noise, images.Crop(resized, 0, 0, resized))
    assert whole.min() >= 50
    assert whole.max() <= 200
    doubled = images.resize(mask, Size(80, 48), "nearest")  # of another size: it lies over the same image
    assert close(images.apply_crop_to_values(doubled, cut), inside, 110)
    assert np.array_equal(images.apply_crop_to_values(doubled, cut)[1:-1, 1:-1], inside[1:-1, 1:-1])


def test_face_box(tmp_path):
    assert images.face_box(tmp_path / "my_pic_100_50_30_40.png") == (100, 50, 30, 40)
    assert images.face_box(tmp_path / "100_50_30_40.png") is None
    assert images.face_box(tmp_path / "a_b_c_d_e.png") is None


def test_face_crop_centres_the_face_at_the_chosen_scale():
    source = np.zeros((600, 800, 3), np.uint8)
    source[270:330, 470:530] = 255  # face of 60 around (500, 300)
    face = images.FaceBox(500, 300, 60, 60)
    # The frame of 300 is to be 6 faces wide: scale 300 / (60 * 6) = 0.8333, so the face measures 50.
    chosen = images.face_crop(Size(800, 600), face, Size(300, 300), (6.0, 6.0), Random(0))
    assert chosen.resized == (667, 500)
    cut = images.apply_crop(source, chosen)
    rows, columns = np.nonzero(cut[..., 0] > 127)
    assert cut.shape == (300, 300, 3)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == pytest.approx((125, 174, 125, 174), abs=1)


def test_face_crop_stays_inside_and_never_enlarges():
    for seed in range(100):
        rng = Random(seed)
        face = images.FaceBox(rng.randint(0, 499), rng.randint(0, 399), rng.randint(1, 300), rng.randint(1, 300))
        cut = images.face_crop(Size(500, 400), face, Size(320, 256), (1.0, 4.0), rng, anywhere=seed % 2 == 0)
        assert cut.to == (320, 256)
        assert cut.resized.width <= 500
        assert cut.resized.height <= 400
        assert 0 <= cut.left <= cut.resized.width - 320
        assert 0 <= cut.top <= cut.resized.height - 256


def test_face_crop_leaves_an_image_of_the_right_size_alone():
    face = images.FaceBox(10, 10, 5, 5)
    cut = images.face_crop(Size(320, 256), face, Size(320, 256), (1.0, 4.0), Random(0))
    assert cut == (Size(320, 256), 0, 0, Size(320, 256))


@pytest.mark.rows("R219")
def test_colours_vary_slightly_and_only_now_and_then():
    source = gradient()
    before = source.copy()
    results = [images.vary_colours(source, Random(seed)) for seed in range(300)]
    changed = [result for result in results if not np.array_equal(result, source)]
    assert 60 < len(changed) < 140  # a third, less the draws of no change
    assert np.array_equal(source, before)
    assert all(np.abs(result.astype(int) - source.astype(int)).mean() < 30 for result in changed)


def test_to_pixels():
    image = np.zeros((2, 3, 3), np.uint8)
    image[0, 0] = (255, 0, 51)
    pixels = images.to_pixels(image[:, ::-1])
    assert pixels.shape == (3, 2, 3)
    assert pixels[:, 0, 2].tolist() == pytest.approx([1.0, -1.0, -0.6], abs=1e-6)
    assert pixels.is_contiguous()


# ---- transparency and masks


def rgba_gradient(alpha):
    return np.concatenate([gradient(), np.broadcast_to(np.uint8(alpha), (24, 40))[..., None]], axis=-1)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_alpha_beside_the_colours_as_stored(tmp_path, suffix):
    alpha = np.linspace(0, 255, 24 * 40).reshape(24, 40).astype(np.uint8)
    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgba_gradient(alpha)).save(path, lossless=True, exact=True, exif=exif)
    rgb, opacity = images.read_image_and_alpha(path)
    assert np.array_equal(rgb, np.rot90(gradient(), -1))  # also where nothing of it is seen
    assert np.array_equal(opacity, np.rot90(alpha, -1))


def test_alpha_of_images_that_keep_it_elsewhere(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "none.jpg", quality=100)
    rgb, opacity = images.read_image_and_alpha(tmp_path / "none.jpg")
    assert np.array_equal(rgb, images.read_image(tmp_path / "none.jpg"))
    assert (opacity == 255).all()
    assert opacity.shape == (24, 40)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "palette.png", transparency=bytes([64, 200]))
    rgb, opacity = images.read_image_and_alpha(tmp_path / "palette.png")
    assert (rgb[0, 0].tolist(), rgb[0, 1].tolist(), opacity[0, :2].tolist()) == ([255, 0, 0], [0, 0, 255], [64, 200])
    values = (np.arange(24 * 40, dtype=np.uint16) * 60).reshape(24, 40)
    Image.fromarray(values).save(tmp_path / "deep.png", transparency=600)
    rgb, opacity = images.read_image_and_alpha(tmp_path / "deep.png")
    assert close(rgb[..., 1], np.round(values / 257), 0)
    assert np.array_equal(opacity, np.where(values == 600, 0, 255))


def test_mask_is_the_red_channel_whatever_is_transparent(tmp_path):
    Image.fromarray(rgba_gradient(7)).save(tmp_path / "a.png")
    assert np.array_equal(images.read_values(tmp_path / "a.png"), gradient())
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(gradient()[..., 1]).save(tmp_path / "grey.png", exif=exif, icc_profile=grey_profile(1.2))
    assert np.array_equal(images.read_values(tmp_path / "grey.png")[..., 0], gradient()[::-1, ::-1, 1])
    assert not np.array_equal(images.read_image(tmp_path / "grey.png")[..., 0], gradient()[::-1, ::-1, 1])


# ---- colour profiles: made here from the ICC specification, and applied here with NumPy

SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])  # to XYZ, D50
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
D50 = (0.9642, 1.0, 0.8249)


def fixed(*values):
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def curve(gamma):
    return b"curv" + struct.pack(">IIHH", 0, 1, round(gamma * 256), 0)


def profile(space, tags, kind=b"mntr", connection=b"XYZ "):
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4sI", start + len(body), b"\0" * 4, 0x02400000) + kind + space + connection
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(*D50)
    return header.ljust(128, b"\0") + table + body


def rgb_profile(matrix, gamma=2.2, more=None):
    tags = {**(more or {}), b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50)}
    for letter, column in zip((b"r", b"g", b"b"), matrix.T, strict=True):
        tags[letter + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(*column)
        tags[letter + b"TRC"] = curve(gamma)
    return profile(b"RGB ", tags)


def grey_profile(gamma):
    return profile(b"GRAY", {b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50), b"kTRC": curve(gamma)})


def cmyk_profile(inks):
    """`inks` gives L*, a*, b* for (c, m, y, k), each 0 or 1; what lies between is interpolated."""
    identity = bytes(range(256))
    corners = [inks((n >> 3) & 1, (n >> 2) & 1, (n >> 1) & 1, n & 1) for n in range(16)]
    grid = b"".join(bytes([round(light * 2.55), a + 128, b + 128]) for light, a, b in corners)
    table = b"mft1" + struct.pack(">IBBBB", 0, 4, 3, 2, 0) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += identity * 4 + grid + identity * 3
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50), b"A2B0": table}
    return profile(b"CMYK", tags, b"prtr", b"Lab ")


def inks(c, m, y, k):
    light = 0 if k else 100 - 20 * c - 25 * m - 5 * y
    return (light, 0, 0) if k else (light, -20 * c + 30 * m, -25 * c + 35 * y)


def srgb_of(xyz):
    linear = np.clip(xyz @ np.linalg.inv(SRGB).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def xyz_of_lab(light, a, b):
    f = np.array([(light + 16) / 116 + a / 500, (light + 16) / 116, (light + 16) / 116 - b / 200])
    return np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50


@pytest.mark.parametrize("matrix", [DISPLAY_P3, SRGB[:, [1, 2, 0]]], ids=["display-p3", "channels-exchanged"])
@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_rgb_profile(tmp_path, matrix, suffix):
    path = tmp_path / f"a{suffix}"
    options = {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {"lossless": True}
    Image.fromarray(gradient()).save(path, icc_profile=rgb_profile(matrix), **options)
    stored = images.read_values(path)  # as decoded, without the profile
    assert close(stored, gradient(), 8)
    expected = srgb_of((stored / 255) ** (563 / 256) @ matrix.T)  # 563/256: 2.2 as the profile stores it
    assert close(images.read_image(path), expected.round(), 2)
    assert np.abs(expected - stored).max() > 40


def test_profile_and_transparency(tmp_path):
    alpha = np.full((24, 40), 255, np.uint8)
    alpha[:, :20] = 0
    Image.fromarray(rgba_gradient(alpha)).save(tmp_path / "a.png", icc_profile=rgb_profile(DISPLAY_P3))
    expected = srgb_of((gradient() / 255) ** (563 / 256) @ DISPLAY_P3.T).round()
    rgb, opacity = images.read_image_and_alpha(tmp_path / "a.png")
    assert close(rgb, expected, 2)
    assert np.array_equal(opacity, alpha)
    image = images.read_image(tmp_path / "a.png")
    assert close(image[:, 20:], expected[:, 20:], 2)
    assert (image[:, :20] == 255).all()


def test_grey_profile(tmp_path):
    grey = gradient()[..., 0]
    Image.fromarray(grey).save(tmp_path / "a.png", icc_profile=grey_profile(1.5))
    expected = srgb_of(((grey / 255) ** 1.5)[..., None] * D50).round()
    assert close(images.read_image(tmp_path / "a.png"), expected, 2)
    Image.fromarray(np.dstack([grey, grey]), "LA").save(tmp_path / "la.png", icc_profile=grey_profile(1.5))
    assert close(images.read_image_and_alpha(tmp_path / "la.png")[0], expected, 2)
    # Grey with an RGB profile: what equal parts of its red, green and blue look like.
    Image.fromarray(grey).save(tmp_path / "rgb.png", icc_profile=rgb_profile(DISPLAY_P3, 1.5))
    assert close(images.read_image(tmp_path / "rgb.png"), expected, 2)


@pytest.mark.parametrize("ink", [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 0, 0)])
def test_cmyk_profile(tmp_path, ink):
    cmyk = np.broadcast_to(np.uint8(ink) * np.uint8(255), (24, 40, 4))
    Image.fromarray(np.ascontiguousarray(cmyk), "CMYK").save(
        tmp_path / "a.jpg", quality=100, icc_profile=cmyk_profile(inks)
    )
    expected = np.broadcast_to(srgb_of(xyz_of_lab(*inks(*ink))).round(), (24, 40, 3))
    assert close(images.read_image(tmp_path / "a.jpg"), expected, 4)


def test_srgb_profiles_change_nothing(tmp_path):
    littlecms = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for number, srgb in enumerate((littlecms, None)):
        Image.fromarray(gradient()).save(tmp_path / f"{number}.png", icc_profile=srgb)
        assert np.array_equal(images.read_image(tmp_path / f"{number}.png"), gradient())


@pytest.mark.parametrize(
    "wrong",
    [b"no profile at all", rgb_profile(DISPLAY_P3)[:200], rgb_profile(DISPLAY_P3).replace(b"rTRC", b"xxxx"),
     cmyk_profile(inks), grey_profile(1.5), profile(b"Luv ", {})],
    ids=["junk", "cut off", "no curve", "of other channels", "of grey", "of a space that no image has"],
)  # fmt: skip
def test_a_profile_that_cannot_be_used_is_left_out(tmp_path, wrong, caplog, monkeypatch):
    monkeypatch.setattr(images.LOGGER, "propagate", True)
    Image.fromarray(gradient()).save(tmp_path / "a.png", icc_profile=wrong)
    with caplog.at_level(logging.DEBUG, images.LOGGER.name):
        assert np.array_equal(images.read_image(tmp_path / "a.png"), gradient())
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert "a.png: its colour profile" in caplog.text


# ---- files of every condition: what the look before training says, and what decoding gives


def saved(array, suffix, **options):
    file = BytesIO()
    Image.fromarray(array).save(file, {"jpg": "JPEG"}.get(suffix, suffix.upper()), **options)
    return file.getvalue()


def noise(*shape):
    return np.random.default_rng(3).integers(0, 256, (*shape, 3), np.uint8)


def turned_by(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def idat_changed(at_checksum):
    content = bytearray(saved(gradient(), "png"))
    start = content.index(b"IDAT") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big")
    content[start + length if at_checksum else start + length // 2] ^= 0xFF
    return bytes(content)


def animated(suffix, **options):
    others = [Image.fromarray(gradient()[::-1]), Image.fromarray(gradient()[:, ::-1])]
    return saved(gradient(), suffix, save_all=True, append_images=others, duration=100, **options)


def palette_with_transparency():
    image = Image.new("P", (40, 24), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 40, 12))
    file = BytesIO()
    image.save(file, "PNG", transparency=bytes([0, 255]))
    return file.getvalue()


def cmyk_jpeg():
    cmyk = np.zeros((24, 40, 4), np.uint8)
    cmyk[..., 1:3] = 255
    file = BytesIO()
    Image.fromarray(cmyk, "CMYK").save(file, "JPEG", quality=100)
    return file.getvalue()


def all_of(*colour):
    return np.broadcast_to(np.uint8(colour), (24, 40, 3))


GREY = gradient()[..., 0]
HALF_WHITE = np.where(np.arange(24)[:, None, None] < 12, np.uint8(255), all_of(0, 0, 255))
DEEP = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
PLAIN = [40, 24, False, 1]
EMPTY, CUT_OFF, NO_IMAGE = "the file is empty", "the file is truncated", "no image that can be read"
DAMAGED = "the file is damaged: broken data stream when reading image file"
TOO_LARGE = "it has more than 178 million pixels, too many to read"

# name: (file name, content, what `describe` says, what `read_image` gives or says, how far colours may be off)
CONDITIONS = {
    "empty": ("a.png", b"", EMPTY, EMPTY, 0),
    "text": ("a.png", b"These are words and no image. " * 9, NO_IMAGE, NO_IMAGE, 0),
    "drawing by a program": ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
                             NO_IMAGE, NO_IMAGE, 0),
    "png cut off": ("a.png", saved(noise(200, 300), "png")[:-5000], CUT_OFF, CUT_OFF, 0),
    "png cut off in its header": ("a.png", saved(gradient(), "png")[:20], CUT_OFF, CUT_OFF, 0),
    "jpeg cut off": ("a.jpg", saved(noise(200, 300), "jpg")[:-5000], CUT_OFF, CUT_OFF, 0),
    "webp cut off": ("a.webp", saved(noise(200, 300), "webp")[:-5000], CUT_OFF, CUT_OFF, 0),
    "bmp cut off": ("a.bmp", saved(noise(200, 300), "bmp")[:-5000], CUT_OFF, CUT_OFF, 0),
    "png with a wrong checksum": ("a.png", idat_changed(at_checksum=True), PLAIN, gradient(), 0),
    "png with wrong pixels": ("a.png", idat_changed(at_checksum=False), PLAIN, DAMAGED, 0),  # headers cannot tell
    "animated webp": ("a.webp", animated("webp", lossless=True), [40, 24, False, 3], gradient(), 0),
    "animated png": ("a.png", animated("png"), [40, 24, False, 3], gradient(), 0),
    "grey of 16 bits": ("a.png", saved(DEEP, "png"), PLAIN, np.dstack([np.round(DEEP / 257)] * 3), 0),
    "palette with transparency": ("a.png", palette_with_transparency(), PLAIN, HALF_WHITE, 0),
    "cmyk": ("a.jpg", cmyk_jpeg(), PLAIN, all_of(255, 0, 0), 4),
    "grey with transparency": ("a.png", saved(np.dstack([GREY, np.full_like(GREY, 255)]), "png"), PLAIN,
                               np.dstack([GREY] * 3), 0),
    "one bit": ("a.png", saved(GREY > 99, "png"), PLAIN, np.dstack([np.where(GREY > 99, 255, 0)] * 3), 0),
    "turned jpeg": ("a.jpg", saved(gradient(), "jpg", quality=100, subsampling=0, exif=turned_by(6)),
                    [24, 40, True, 1], np.rot90(gradient(), -1), 8),
    "turned png": ("a.png", saved(gradient(), "png", exif=turned_by(2)), [40, 24, True, 1], gradient()[:, ::-1], 0),
    "broken exif": ("a.webp", saved(gradient(), "webp", lossless=True, exif=b"Exif\0\0XX\0\0"), PLAIN, gradient(), 0),
    "broken profile": ("a.png", saved(gradient(), "png", icc_profile=b"broken"), PLAIN, gradient(), 0),
    "wrong extension": ("a.png", saved(gradient(), "jpg", quality=100, subsampling=0), PLAIN, gradient(), 8),
    "bomb": ("a.png", png(60000, 60000, chunk(b"IDAT", zlib.compress(b""))), TOO_LARGE, TOO_LARGE, 0),
}  # fmt: skip

if features.check("avif"):
    avif = saved(gradient(), "avif", quality=100, subsampling="4:4:4", exif=turned_by(8))
    CONDITIONS |= {
        "avif": ("a.avif", avif, [24, 40, True, 1], np.rot90(gradient()), 6),
        "animated avif": ("a.avif", animated("avif", quality=100, subsampling="4:4:4"), [40, 24, False, 3],
                          gradient(), 6),
        "avif cut off": ("a.avif", avif[:-20], CUT_OFF, CUT_OFF, 0),
        "avif cut off early": ("a.avif", avif[:60], CUT_OFF, CUT_OFF, 0),
    }  # fmt: skip


@pytest.mark.parametrize("condition", CONDITIONS)
def test_files_of_every_condition(tmp_path, condition):
    name, content, described, seen, tolerance = CONDITIONS[condition]
    path = tmp_path / name
    path.write_bytes(content)
    assert images.describe(path) == described
    for read in (images.read_image, images.read_image_and_alpha, images.read_values):
        if isinstance(seen, str):
            with pytest.raises(ValueError, match=f"^{re.escape(seen)}$"):
                read(path)
        else:
            read(path)
    if not isinstance(seen, str):
        assert close(images.read_image(path), seen, tolerance)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_what_is_no_file(tmp_path):
    assert images.describe(tmp_path / "none.png") == "No such file or directory"
    with pytest.raises(FileNotFoundError):
        images.read_image(tmp_path / "none.png")


def test_pillow_does_not_speak(tmp_path):
    """Of images that are large but fine, and of odd palettes. In a program of its own: pytest sets filters too."""
    (tmp_path / "large.png").write_bytes(png(10000, 10000, chunk(b"IDAT", zlib.compress(b""))))
    (tmp_path / "palette.png").write_bytes(palette_with_transparency())
    program = (
        "import sys; from pathlib import Path; from library.data.sample import images; folder = Path(sys.argv[1]);"
        "print(images.describe(folder / 'large.png'), images.read_values(folder / 'palette.png').shape[:2])"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert (result.stdout, result.stderr) == ("[10000, 10000, False, 1] (24, 40)\n", "")


def test_content_digest(tmp_path):
    content = bytes(range(256)) * 9000  # more than one block
    (tmp_path / "a.png").write_bytes(content)
    assert images.content_digest(tmp_path / "a.png") == sha256(content).hexdigest()[:32]


def test_jpeg_xl(tmp_path):
    pytest.importorskip("pillow_jxl", reason="pillow-jxl-plugin is optional")
    assert images.register_jpeg_xl()
    path = tmp_path / "a.jxl"
    Image.fromarray(gradient()).save(path, lossless=True)
    assert images.describe(path) == PLAIN
    assert np.array_equal(images.read_image(path), gradient())
    # A JPEG that was repacked comes back as it was: not turned yet.
    (tmp_path / "a.jpg").write_bytes(saved(gradient(), "jpg", quality=100, subsampling=0, exif=turned_by(6)))
    with Image.open(tmp_path / "a.jpg") as jpeg:
        jpeg.save(path, lossless_jpeg=True)
    assert images.describe(path) == [24, 40, True, 1]
    assert np.array_equal(images.read_image(path), images.read_image(tmp_path / "a.jpg"))


# ---- reduced


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize(
    ("enough", "decoded"),
    [
        ((400, 304), (400, 304)),
        ((201, 152), (400, 304)),
        ((200, 152), (200, 152)),
        ((100, 1), (100, 76)),
        ((1, 1), (50, 38)),
        ((9999, 9999), (400, 304)),
    ],
)
def test_a_jpeg_file_comes_as_small_as_is_enough(tmp_path, orientation, enough, decoded):
    """Sizes are upright ones, whichever way the file lies; and the whole image's size is told."""
    upright = np.kron(gradient(50, 38), np.ones((8, 8, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if orientation == 1 else np.rot90(upright, 2 if orientation == 3 else 1)
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.jpg", quality=98, subsampling=0, exif=exif)
    asked = []
    pixels, size = images.read_reduced(tmp_path / "a.jpg", lambda whole: asked.append(whole) or Size(*enough))
    assert asked == [(400, 304)]
    assert size == (400, 304)
    assert pixels.shape == (decoded[1], decoded[0], 3)
    factor = 400 // decoded[0]
    means = upright.reshape(decoded[1], factor, decoded[0], factor, 3).mean(axis=(1, 3))
    assert np.abs(pixels - means).mean() < 1


def test_other_files_come_whole(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    pixels, size = images.read_reduced(tmp_path / "a.png", lambda whole: Size(1, 1))
    assert np.array_equal(pixels, images.read_image(tmp_path / "a.png"))
    assert size == pixels.shape[1::-1]


@pytest.mark.parametrize(("width", "height"), [(700, 501), (3, 90001), (300001, 2)])
def test_large_images_lose_nothing_on_the_way_to_numpy(tmp_path, width, height):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.bmp")
    assert np.array_equal(images.read_image(tmp_path / "a.bmp"), pixels)


# ---- texts and profiles in PNG files


def png_with(path, *chunks, behind=False):
    """A PNG file of `gradient` with more chunks: (kind, bytes), before or behind its pixels."""
    stream = BytesIO()
    Image.fromarray(gradient()).save(stream, format="PNG")
    plain = stream.getvalue()
    added = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    place = len(plain) - 12 if behind else 33  # behind the header, or before the end
    path.write_bytes(plain[:place] + added + plain[place:])


LONG = zlib.compress(b"x" * 1_500_000)


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind the pixels"])
@pytest.mark.parametrize(
    "chunks",
    [
        [(b"zTXt", b"workflow\0\0" + LONG)],
        [(b"iTXt", b"prompt\0\1\0\0\0" + LONG)],
        [(b"tEXt", b"a\0" + b"x" * 900_000)] * 80,
        [(b"iCCP", b"profile\0\0" + LONG)],
        [(b"iTXt", b"no zeros at all")],
    ],
    ids=["packed text", "packed Unicode text", "many texts", "profile", "broken text"],
)
def test_texts_that_are_too_long_for_the_library_cost_nothing_but_themselves(tmp_path, chunks, behind):
    png_with(tmp_path / "a.png", *chunks, behind=behind)
    assert images.probe(tmp_path / "a.png") == (Size(40, 24), False, 1)
    assert (images.read_image(tmp_path / "a.png") == gradient()).all()
    duplicates.look_at(tmp_path / "a.png")


def test_a_long_colour_profile_still_counts(tmp_path):
    """The same profile with a private tag of megabytes in it."""
    short, long = (rgb_profile(DISPLAY_P3, more=more) for more in ({}, {b"long": fixed(*[0.5] * 400_000)}))
    for name, icc in (("short", short), ("long", long)):
        png_with(tmp_path / f"{name}.png", (b"iCCP", b"profile\0\0" + zlib.compress(icc)))
    assert len(long) > 1_500_000
    read = images.read_image(tmp_path / "long.png")
    assert (read == images.read_image(tmp_path / "short.png")).all()
    assert not (read == gradient()).all()


def test_orientation_stays_where_texts_are_left_out(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    png_with(tmp_path / "a.png", (b"eXIf", exif.tobytes()[6:]), (b"zTXt", b"workflow\0\0" + LONG))
    assert images.probe(tmp_path / "a.png") == (Size(24, 40), True, 1)
    assert (images.read_image(tmp_path / "a.png") == np.rot90(gradient(), -1)).all()


def test_pixels_that_are_broken_stay_broken_without_texts(tmp_path):
    png_with(tmp_path / "a.png", (b"zTXt", b"workflow\0\0" + LONG))
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[content.index(b"IDAT") + 20] ^= 0xFF
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        images.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_no_image(tmp_path, kind):
    if kind == "pipe":
        os.mkfifo(tmp_path / "a.png")
    else:
        (tmp_path / "a.png").symlink_to("/dev/zero")
    assert images.describe(tmp_path / "a.png").startswith(("a named pipe, ", "a device, "))
