"""Headers that are read without Pillow say what Pillow says of them, or leave the file to it."""

from __future__ import annotations

from io import BytesIO
from random import Random

import pytest
from PIL import Image, PngImagePlugin

from library.data.sample import images
from library.data.sample.plain_headers import HEAD, plain_size

SIZE = (37, 21)


def saved(mode: str, form: str, **options: object) -> bytes:
    file = BytesIO()
    Image.effect_noise(SIZE, 90).convert(mode).save(file, form, **options)
    return file.getvalue()


def text(key: str, value: str = "a red cat") -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text(key, value)
    return info


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PLAIN = {
    "jpeg": saved("RGB", "JPEG"),
    "grey jpeg": saved("L", "JPEG"),
    "cmyk jpeg": saved("CMYK", "JPEG"),
    "progressive jpeg": saved("RGB", "JPEG", progressive=True, optimize=True, comment=b"made here"),
    "jpeg with a profile": saved("RGB", "JPEG", icc_profile=b"profile" * 20, dpi=(72, 72)),
    "png": saved("RGB", "PNG"),
    "transparent png": saved("RGBA", "PNG", dpi=(72, 72)),
    "grey png": saved("LA", "PNG"),
    "png with a text": saved("RGB", "PNG", pnginfo=text("parameters")),
    "png with a palette": saved("P", "PNG", transparency=3, bits=4),
    "webp": saved("RGB", "WEBP"),
    "lossless webp": saved("RGB", "WEBP", lossless=True),
}
UNUSUAL = {
    "turned jpeg": saved("RGB", "JPEG", exif=turned()),
    "jpeg with XMP": saved("RGB", "JPEG", xmp=b"<x/>"),
    "turned png": saved("RGB", "PNG", exif=turned()),
    "png with EXIF as a text": saved("RGB", "PNG", pnginfo=text("Raw profile type exif")),
    "grey png with a transparent colour": saved("L", "PNG", transparency=3),
    "animated png": saved("RGB", "PNG", save_all=True, append_images=[Image.new("RGB", SIZE)]),
    "turned webp": saved("RGB", "WEBP", exif=turned()),
    "animated webp": saved("RGB", "WEBP", save_all=True, append_images=[Image.new("RGB", SIZE)]),
    "several jpegs": saved("RGB", "MPO", save_all=True, append_images=[Image.new("RGB", SIZE)]),
    "bmp": saved("RGB", "BMP"),
    "nothing": b"",
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files(name):
    content = PLAIN[name]
    assert plain_size(content[:HEAD], len(content)) == SIZE
    assert plain_size(content[:24], len(content)) is None


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_files_are_left_to_pillow(name):
    content = UNUSUAL[name]
    assert plain_size(content[:HEAD], len(content)) is None


@pytest.mark.parametrize("name", PLAIN)
def test_damaged_headers_are_never_read_otherwise_than_by_pillow(name, tmp_path, monkeypatch):
    """Bytes are changed, cut out and put in; where an answer comes without Pillow, it is Pillow's."""
    rng, answers = Random(name), 0
    for _ in range(40):
        content = bytearray(PLAIN[name])
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(min(len(content), 400))
            content[place : place + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
        file = tmp_path / "image"
        file.write_bytes(content)
        if (size := plain_size(bytes(content[:HEAD]), len(content))) is None:
            continue
        answers += 1
        with monkeypatch.context() as patch:
            patch.setattr(images, "plain_size", lambda *_: None)
            by_pillow = images.describe(file)
        if images._ends_well(BytesIO(content), len(content)):
            assert by_pillow == [*size, False, 1]
    assert answers
