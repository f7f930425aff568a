"""Decoding of real files of every kind, and what is done to their pixels."""

from __future__ import annotations

from random import Random

import cv2
import numpy as np
import pytest
from PIL import Image

from library.data import images
from library.types import Size


def gradient(width=40, height=24):
    """A smooth picture that looks different in every orientation; smooth, so that JPEG changes little."""
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
    assert images.probe(tmp_path / name) == (Size(40, 24), False)


# How a viewer must turn the stored pixels, from the EXIF standard: row 0 and column 0 of the stored picture are ...
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


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 20])
def test_no_picture_at_all(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        images.probe(tmp_path / "a.png")


def test_data_behind_the_picture_does_no_harm(tmp_path):
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


def test_crop():
    source = gradient()
    assert np.array_equal(images.crop(source, Size(37, 20)), source[2:22, 1:38])
    corners = set()
    for seed in range(300):
        cut = images.crop(source, Size(38, 23), Random(seed))
        corners.add((int(np.argmin(np.abs(source[0, :, 0] - int(cut[0, 0, 0])))), int(cut[0, 0, 1]) > 5))
    assert corners == {(left, low) for left in range(3) for low in (False, True)}


def test_face_box(tmp_path):
    assert images.face_box(tmp_path / "my_pic_100_50_30_40.png") == (100, 50, 30, 40)
    assert images.face_box(tmp_path / "100_50_30_40.png") is None
    assert images.face_box(tmp_path / "a_b_c_d_e.png") is None


def test_face_crop_centres_the_face_at_the_chosen_scale():
    source = np.zeros((600, 800, 3), np.uint8)
    source[270:330, 470:530] = 255  # face of 60 around (500, 300)
    face = images.FaceBox(500, 300, 60, 60)
    # The frame of 300 is to be 6 faces wide: scale 300 / (60 * 6) = 0.8333, so the face measures 50.
    cut = images.crop_face(source, face, Size(300, 300), (6.0, 6.0), Random(0))
    rows, columns = np.nonzero(cut[..., 0] > 127)
    assert cut.shape == (300, 300, 3)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == pytest.approx((125, 174, 125, 174), abs=1)


def test_face_crop_stays_inside_and_never_enlarges():
    source = gradient(500, 400)
    for seed in range(100):
        rng = Random(seed)
        face = images.FaceBox(rng.randint(0, 499), rng.randint(0, 399), rng.randint(1, 300), rng.randint(1, 300))
        cut = images.crop_face(source, face, Size(320, 256), (1.0, 4.0), rng, anywhere=seed % 2 == 0)
        assert cut.shape == (256, 320, 3)


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
