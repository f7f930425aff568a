"""Copies of images are found, different images and images without structure are not."""

from __future__ import annotations

import io
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from library.data.scan import duplicates

PHOTOS = 30


def photo(seed, size=(320, 240)):
    """A smooth random field in colour: amplitudes fall with frequency, as they do in photos."""
    rng = np.random.default_rng(seed)
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width) * width)
    frequency[0, 0] = 1
    noise = np.fft.fft2(rng.standard_normal((3, height, width)), axes=(1, 2))
    noise = noise[:1] + 0.4 * noise  # the channels have most of their structure in common
    field = np.fft.ifft2(noise * frequency**-1.5, axes=(1, 2)).real
    field = (field - field.mean()) / field.std() * 45 + 128
    return Image.fromarray(np.clip(field, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def jpeg(image, quality):
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data)


COPIES = {
    "quality 70": ("jpg", lambda image: image, {"quality": 70}),
    "half the size": ("png", lambda image: image.resize((160, 120), Image.Resampling.LANCZOS), {}),
    "half the size, quality 70": ("jpg", lambda image: image.resize((160, 120)), {"quality": 70}),
    "larger": ("webp", lambda image: image.resize((480, 360)), {"quality": 90, "method": 0}),
    "JPEG of a JPEG": ("jpg", lambda image: jpeg(image, 80), {"quality": 85}),
}


@pytest.fixture(scope="module")
def originals():
    return [photo(seed) for seed in range(PHOTOS)]


def looks_of(images, folder, suffix, **options):
    paths = [folder / f"{number}.{suffix}" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path, **options)
    return [duplicates.look_at(path) for path in paths]


@pytest.mark.parametrize("kind", COPIES)
def test_each_copy_is_found_with_its_original_only(tmp_path, originals, kind):
    suffix, change, options = COPIES[kind]
    (tmp_path / "copies").mkdir()
    looks = looks_of(originals, tmp_path, "png")
    looks += looks_of([change(image) for image in originals], tmp_path / "copies", suffix, **options)
    assert duplicates.near_duplicates(looks) == [[number, number + PHOTOS] for number in range(PHOTOS)]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_the_upright_image_counts(tmp_path, suffix, orientation):
    upright, exif = photo(0), Image.Exif()
    stored = upright.transpose({3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation])
    exif[0x0112] = orientation
    looks = looks_of([upright], tmp_path, "bmp") + looks_of([stored], tmp_path, suffix, exif=exif)
    assert duplicates.near_duplicates(looks) == [[0, 1]]
    assert duplicates.near_duplicates(looks[:1] + looks_of([stored], tmp_path, suffix)) == []


def test_bits_are_fields_brighter_than_their_left_neighbour(tmp_path):
    """Fields of one grey each, so that means are exact; the hash comes from the definition."""
    fields = np.random.default_rng(0).integers(0, 26, (8, 9)) * 10
    Image.fromarray(fields.repeat(6, axis=0).repeat(5, axis=1).astype(np.uint8)).save(tmp_path / "a.png")
    bits = "".join("1" if row[x + 1] > row[x] else "0" for row in fields for x in range(8))
    assert duplicates.look_at(tmp_path / "a.png").hash == int(bits, 2)


def test_what_transparency_hides_is_not_looked_at(tmp_path):
    """A cut-out on white and its transparent original with other colours behind it are the same image."""
    top, hidden = np.asarray(photo(1)), np.asarray(photo(2))
    alpha = np.asarray(photo(3).convert("L"))[..., None] > 128
    shown = Image.fromarray(np.where(alpha, top, 255).astype(np.uint8))
    stored = Image.fromarray(np.concatenate([np.where(alpha, top, hidden), alpha * 255], -1).astype(np.uint8))
    first, second = looks_of([shown, stored], tmp_path, "png")
    assert first.hash is not None
    assert first == second


def house(wall):
    image = Image.new("RGB", (200, 200), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    draw.polygon([(20, 90), (100, 20), (180, 90)], fill=(120, 20, 20))
    draw.rectangle((40, 90, 160, 180), fill=wall)
    draw.rectangle((60, 120, 90, 150), fill=(10, 10, 60))
    draw.rectangle((110, 120, 140, 180), fill=(60, 40, 10))
    return image


def test_drawings_of_other_colours_are_no_near_duplicates(tmp_path):
    """A grey and a beige house, whose grey levels rise and fall alike; each with a copy of poor quality."""
    walls = [(200, 200, 200), (235, 205, 150), (150, 215, 235)]
    looks = looks_of([house(wall) for wall in walls], tmp_path, "png")
    looks += looks_of([house(wall) for wall in walls], tmp_path, "jpg", quality=60)
    assert len({look.hash for look in looks}) == 1
    assert duplicates.near_duplicates(looks) == [[0, 3], [1, 4], [2, 5]]


def plain(colour):
    return Image.new("RGB", (200, 150), colour)


def gradient(low, high, turned=False):
    ramp = np.linspace(low, high, 200).astype(np.uint8)[None].repeat(150, axis=0)
    return Image.fromarray(ramp.T if turned else ramp)


def dot(x, y):
    image = plain("white")
    ImageDraw.Draw(image).ellipse((x, y, x + 15, y + 15), fill="black")
    return image


STRUCTURELESS = {
    "black": plain("black"),
    "grey": plain((127, 128, 130)),
    "rising": gradient(0, 255),
    "falling": gradient(240, 30),
    "downwards": gradient(0, 255, turned=True),
    "dot": dot(40, 30),
    "other dot": dot(140, 100),
    "noise": Image.fromarray(np.random.default_rng(0).integers(126, 130, (150, 200), np.uint8)),
    "one pixel": Image.new("RGB", (1, 1), "red"),
}


@pytest.mark.parametrize("options", [("png", {}), ("jpg", {"quality": 60})], ids=lambda options: options[0])
def test_images_without_structure_have_no_look(tmp_path, options):
    suffix, how = options
    found = [look.hash for look in looks_of(list(STRUCTURELESS.values()), tmp_path, suffix, **how)]
    assert dict(zip(STRUCTURELESS, found, strict=True)) == dict.fromkeys(STRUCTURELESS)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_damaged_files_are_refused(tmp_path, suffix):
    photo(0).save(tmp_path / f"whole.{suffix}")
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    broken = {"cut": data[: len(data) // 2], "head": data[:20], "empty": b"", "text": b"1girl, solo"}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    for name in [*broken, "missing"]:
        with pytest.raises((OSError, ValueError)):
            duplicates.look_at(tmp_path / name)


def test_equal_digests_are_grouped():
    assert duplicates.exact(["b", "a", "c", "a", "b", "a"]) == [[0, 4], [1, 3, 5]]
    assert duplicates.exact(["a", "b"]) == duplicates.exact([]) == []


def near_by_all_pairs(looks, distance):
    """The definition: images within the distance are together, and so is everything that this connects."""
    group_of = {index: {index} for index, value in enumerate(looks) if value is not None}
    for one in group_of:
        for other in group_of:
            if (looks[one] ^ looks[other]).bit_count() <= distance and group_of[one] is not group_of[other]:
                group_of[one] |= group_of[other]
                for member in group_of[other]:
                    group_of[member] = group_of[one]
    groups = {tuple(sorted(group)) for group in group_of.values() if len(group) > 1}
    return [list(group) for group in sorted(groups)]


def flip(value, count, rng):
    for bit in rng.sample(range(64), count):
        value ^= 1 << bit
    return value


@pytest.mark.parametrize("seed", range(30))
def test_the_same_groups_as_by_all_pairs(seed):
    """Random hashes around few centres, at distances on both sides of the limit; some bits may be the same for all."""
    rng = Random(seed)
    distance, mask = rng.randrange(7), rng.choice([2**64 - 1, rng.getrandbits(64), 0xFFFF])
    centres = [rng.getrandbits(64) for _ in range(12)]
    looks = [flip(rng.choice(centres), rng.randint(0, distance + 2), rng) & mask for _ in range(150)]
    looks = [None if rng.random() < 0.05 else value for value in looks]
    assert duplicates.similar(looks, distance) == near_by_all_pairs(looks, distance)


@pytest.mark.parametrize("distance", [0, 1, 4, 16])
def test_the_limit_itself_is_near_and_one_more_is_not(distance):
    rng = Random(distance)
    for _ in range(5):
        value = rng.getrandbits(64)
        assert duplicates.similar([value, flip(value, distance, rng)], distance) == [[0, 1]]
        assert duplicates.similar([value, flip(value, distance + 1, rng)], distance) == []


def test_many_equal_looks_are_no_burden():
    """50,000 equal ones: if pairs of them were compared, this would take minutes and gigabytes."""
    rng = Random(0)
    others = [rng.getrandbits(64) for _ in range(200)]
    assert duplicates.similar([7, *others, *[7] * 50_000]) == [[0, *range(201, 50_201)]]


def test_nothing_to_compare():
    assert duplicates.similar([]) == duplicates.similar([None, None]) == duplicates.similar([5]) == []


@pytest.mark.parametrize("distance", [-1, 17])
def test_a_distance_that_cannot_be_served_is_refused(distance):
    with pytest.raises(ValueError, match="0 to 16"):
        duplicates.similar([1, 2], distance)
