"""Images in smaller sizes: which size, which cut, which names, and what is copied along."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from PIL import Image

from library.errors import UserError
from library.options.image_tools import parse_sizes
from library.options.parsing import parse_options
from library.preparation.common.summary import Outcome
from library.preparation.images import image_files
from library.preparation.images.resizing import GROUPS, companions, fit, resize_images, result_name, without_namesakes
from library.types import Size


def image(width, height):
    """Brighter to the right and greener downwards, without fine detail."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / width, y * 255 / height, np.full_like(x, 90)], axis=-1).astype(np.uint8)


def resize(source, target, *arguments):
    return resize_images(parse_options(GROUPS, [str(source), str(target), *arguments]))


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in", tmp_path / "out"


# Worked out by hand: floor(side * sqrt(most / pixels)), then down to a multiple, the overhang cut equally.
@pytest.mark.parametrize(
    ("size", "most", "divisible_by", "resized", "left", "top", "to"),
    [
        ((1024, 1024), (512, 512), 1, (512, 512), 0, 0, (512, 512)),
        ((1000, 1000), (512, 512), 1, (512, 512), 0, 0, (512, 512)),
        ((2000, 1000), (512, 512), 1, (724, 362), 0, 0, (724, 362)),
        ((2000, 1000), (512, 512), 64, (724, 362), 10, 21, (704, 320)),
        ((2000, 1000), (768, 384), 8, (768, 384), 0, 0, (768, 384)),
        ((300, 200), (512, 512), 1, (300, 200), 0, 0, (300, 200)),
        ((300, 200), (512, 512), 64, (300, 200), 22, 4, (256, 192)),
        ((1, 100000), (128, 128), 1, (1, 40477), 0, 0, (1, 40477)),
        ((100000, 1), (16, 16), 1, (5059, 1), 0, 0, (5059, 1)),
    ],
)
def test_sizes(size, most, divisible_by, resized, left, top, to):
    assert fit(Size(*size), Size(*most), divisible_by) == (resized, left, top, to)


def test_nothing_is_left_of_a_narrow_image():
    with pytest.raises(ValueError, match=r"50x300 pixels are too few for --divisible_by=64"):
        fit(Size(50, 300), Size(512, 512), 64)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("512x512,384x256", [(512, 512), (384, 256)]),
        (" 512X384 , 64x64", [(512, 384), (64, 64)]),
        ("64x64,64x64", [(64, 64)]),
    ],
)
def test_list_of_sizes(text, sizes):
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["512", "512x", "x512", "512x0", "512x-1", "512x512,", "", "axb", "1.5x2"])
def test_what_is_no_list_of_sizes(text):
    with pytest.raises(ValueError, match="must be sizes such as"):
        parse_sizes(text)


def test_names():
    assert result_name("a.b.PNG", Size(512, 384), ".jpg") == "a.b+512x384.jpg"
    beside = ["a.caption", "a.jpg", "a.npz", "a.NPZ", "a.txt", "a.b.txt", "ab.txt", "a", "a_1.txt"]
    assert companions("a.png", beside) == ["a.caption", "a.txt", "a"]


def test_every_image_in_every_size(folders):
    source, target = folders
    Image.fromarray(image(200, 100)).save(source / "wide.png")
    Image.fromarray(image(60, 60)).save(source / "small.jpg", quality=100)
    outcome = resize(source, target, "--max_resolution=100x100,64x32")
    assert (outcome.done, outcome.skipped, outcome.failed) == (2, 0, {})
    sizes = {path.name: Image.open(path).size for path in target.iterdir()}
    assert sizes == {
        "wide+100x100.jpg": (141, 70),
        "wide+64x32.jpg": (64, 32),
        "small+100x100.jpg": (60, 60),
        "small+64x32.jpg": (45, 45),
    }
    result = np.asarray(Image.open(target / "wide+64x32.jpg")).astype(int)
    assert np.abs(result - image(64, 32)).max() <= 6


@pytest.mark.parametrize("interpolation", ["area", "cubic", "lanczos4", "nearest", "linear", "box"])
def test_ways_of_resizing(folders, interpolation):
    source, target = folders
    Image.fromarray(image(128, 128)).save(source / "a.png")
    resize(source, target, "--max_resolution=32x32", f"--interpolation={interpolation}", "--save_as_png")
    result = np.asarray(Image.open(target / "a+32x32.png")).astype(int)
    assert np.abs(result - image(32, 32)).max() <= 8


def test_lanczos_has_no_jagged_edges(folders):
    source, target = folders
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[::2] = 255
    Image.fromarray(stripes).save(source / "a.png")
    for way, grey in (("lanczos4", True), ("area", True), ("nearest", False)):
        resize(source, target, "--max_resolution=32x32", f"--interpolation={way}", "--save_as_png")
        middle = np.asarray(Image.open(target / "a+32x32.png")).astype(int)[4:-4]
        assert (np.abs(middle - 128).max() < 20) == grey, way


def test_the_cut_is_around_the_middle(folders):
    source, target = folders
    Image.fromarray(image(100, 80)).save(source / "a.png")
    resize(source, target, "--divisible_by=64", "--save_as_png", "--max_resolution=512x512")
    assert np.array_equal(np.asarray(Image.open(target / "a+512x512.png")), image(100, 80)[8:72, 18:82])


def test_turned_and_transparent_images(folders):
    source, target = folders
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(image(80, 40)).save(source / "turned.jpg", exif=exif, quality=100)
    see_through = np.dstack([image(40, 40), np.zeros((40, 40), np.uint8)])
    see_through[:20, :, 3] = 255
    Image.fromarray(see_through).save(source / "clear.png")

    resize(source, target, "--max_resolution=512x512")
    turned = Image.open(target / "turned+512x512.jpg")
    assert turned.size == (40, 80)
    assert not turned.getexif()  # a viewer must not turn it once more
    flat = np.asarray(Image.open(target / "clear+512x512.jpg")).astype(int)
    assert np.abs(flat[:16] - image(40, 40)[:16]).max() <= 6
    assert flat[24:].min() > 250

    resize(source, target, "--max_resolution=20x20", "--save_as_png")
    clear = Image.open(target / "clear+20x20.png")
    assert clear.mode == "RGBA"
    assert np.asarray(clear)[..., 3].tolist() == [[255] * 20] * 10 + [[0] * 20] * 10
    assert Image.open(target / "turned+20x20.png").mode == "RGB"


def test_files_that_belong_to_an_image_go_along(folders):
    source, target = folders
    Image.fromarray(image(64, 64)).save(source / "猫 1.png")
    for name, content in {"猫 1.txt": "tags", "猫 1.caption": "a cat", "猫 1.npz": "old", "2.txt": "other"}.items():
        (source / name).write_text(content, encoding="utf-8")
    resize(source, target, "--max_resolution=32x32,16x16", "--copy_associated_files")
    assert sorted(path.name for path in target.iterdir()) == [
        *("猫 1+16x16.caption", "猫 1+16x16.jpg", "猫 1+16x16.txt"),
        *("猫 1+32x32.caption", "猫 1+32x32.jpg", "猫 1+32x32.txt"),
    ]
    assert (target / "猫 1+32x32.caption").read_text() == "a cat"
    assert sorted(path.name for path in source.iterdir()) == [
        "2.txt",
        "猫 1.caption",
        "猫 1.npz",
        "猫 1.png",
        "猫 1.txt",
    ]


def test_bad_images_are_named_and_the_rest_is_done(folders, caplog, console):
    source, target = folders
    Image.fromarray(image(64, 64)).save(source / "good.png")
    (source / "empty.jpg").write_bytes(b"")
    (source / "cut.png").write_bytes((source / "good.png").read_bytes()[:100])
    (source / "text.webp").write_text("no image")
    Image.fromarray(image(300, 20)).save(source / "narrow.bmp")
    with caplog.at_level(logging.WARNING):
        outcome = resize(source, target, "--max_resolution=64x64", "--divisible_by=32")
    assert outcome.done == 1
    assert [path.name for path in target.iterdir()] == ["good+64x64.jpg"]
    reasons = {path.name: reason for path, reason in outcome.failed.items()}
    assert reasons == {
        "empty.jpg": "the file is empty",
        "cut.png": "the file is truncated",
        "text.webp": "no image that can be read",
        "narrow.bmp": "247x16 pixels are too few for --divisible_by=32",
    }


def test_namesakes_do_not_replace_each_other(tmp_path):
    outcome = Outcome()
    images = [tmp_path / name for name in ("a.jpg", "a.png", "b.png")]
    assert without_namesakes(images, outcome) == [images[0], images[2]]
    assert "a.jpg" in outcome.failed[images[1]]


def test_a_second_run_goes_on_where_the_first_one_ended(folders):
    source, target = folders
    for name in ("a", "b"):
        Image.fromarray(image(64, 64)).save(source / f"{name}.png")
    resize(source, target, "--max_resolution=32x32,16x16")
    kept, emptied, gone = (target / name for name in ("a+32x32.jpg", "b+32x32.jpg", "b+16x16.jpg"))
    kept.write_bytes(b"mine")
    emptied.write_bytes(b"")  # as a power cut may leave it
    gone.unlink()
    outcome = resize(source, target, "--max_resolution=32x32,16x16", "--skip_existing")
    assert (outcome.done, outcome.skipped) == (1, 1)
    assert kept.read_bytes() == b"mine"
    assert Image.open(emptied).size == (32, 32)
    assert Image.open(gone).size == (16, 16)
    resize(source, target, "--max_resolution=32x32,16x16")
    assert Image.open(kept).size == (32, 32)


def test_results_need_a_folder_of_their_own(folders):
    source, _ = folders
    Image.fromarray(image(64, 64)).save(source / "a.png")
    with pytest.raises(UserError, match="another folder for the results"):
        resize(source, source)


def test_a_full_disk_ends_the_run(folders, monkeypatch):
    source, target = folders
    for name in "abc":
        Image.fromarray(image(64, 64)).save(source / f"{name}.png")

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_files, "replacing", full)
    with pytest.raises(UserError, match=r"a\+512x512\.jpg: cannot be written \(No space left on device\)"):
        resize(source, target, "--max_resolution=512x512")
    assert not list(target.iterdir())
