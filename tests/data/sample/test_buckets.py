"""Bucket sizes, choices and crops against the worked examples of the format sheet."""

from __future__ import annotations

import math
from fractions import Fraction
from random import Random

import pytest

from library.data.sample import buckets
from library.types import Size


def square(side):
    return Size(side, side)


@pytest.mark.rows("R34", "R35", "R44", "R48")
def test_sizes_of_512():
    landscape = [
        (c, r) for r, cs in {256: (832, 896, 960, 1024), 320: (704, 768), 384: (640,), 448: (576,)}.items() for c in cs
    ]
    expected = sorted([*landscape, *((b, a) for a, b in landscape), (512, 512)])
    assert buckets.bucket_sizes(square(512), 256, 1024, 64) == expected
    assert len(expected) == 17


@pytest.mark.parametrize(
    ("side", "low", "high", "step", "count"),
    [(1024, 512, 2048, 64, 33), (1024, 256, 2048, 32, 81), (1024, 256, 1024, 64, 25)],
)
def test_number_of_sizes(side, low, high, step, count):
    assert len(buckets.bucket_sizes(square(side), low, high, step)) == count


def test_upper_limit_caps_the_area():
    assert all(1024 in size for size in buckets.bucket_sizes(square(1024), 256, 1024, 64))


@pytest.mark.rows("R36")
@pytest.mark.parametrize("resolution", [square(512), Size(768, 512), Size(448, 640), square(1000), square(64)])
@pytest.mark.parametrize("step", [32, 64])
def test_properties_of_sizes(resolution, step):
    low, high = 64, 1536
    sizes = buckets.bucket_sizes(resolution, low, high, step)
    assert sizes == sorted(set(sizes))
    assert all(w % step == 0 and h % step == 0 and low <= min(w, h) and max(w, h) <= high for w, h in sizes)
    assert all(w * h <= resolution.width * resolution.height for w, h in sizes)


@pytest.mark.rows("R45")
def test_lower_limit_rules_sizes_out():
    sizes = buckets.bucket_sizes(square(512), 384, 1024, 64)
    assert sizes == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]


# image, resolution, (min, max), step, bucket, resized, pixel crop (left, top), crop_ltrb
WORKED = [
    ((512, 512), (512, 512), (256, 1024), 64, (512, 512), (512, 512), (0, 0), (0, 0, 512, 512)),
    ((1920, 1080), (512, 512), (256, 1024), 64, (640, 384), (683, 384), (21, 0), (0, 12, 640, 372)),
    ((800, 1200), (512, 512), (256, 1024), 64, (384, 640), (427, 640), (21, 0), (0, 32, 384, 608)),
    ((1920, 1080), (1024, 1024), (512, 2048), 64, (1344, 768), (1365, 768), (10, 0), (0, 6, 1344, 762)),
    ((1080, 1920), (1024, 1024), (512, 2048), 64, (768, 1344), (768, 1365), (0, 10), (6, 0, 762, 1344)),
    ((4000, 1000), (1024, 1024), (512, 2048), 64, (2048, 512), (2048, 512), (0, 0), (0, 0, 2048, 512)),
    ((640, 480), (1024, 1024), (256, 1024), 64, (1024, 768), (1024, 768), (0, 0), (0, 0, 1024, 768)),
    ((1500, 1000), (768, 512), (256, 1024), 64, (768, 512), (768, 512), (0, 0), (0, 0, 768, 512)),
    ((1333, 2000), (1024, 1024), (256, 2048), 64, (832, 1216), (832, 1248), (0, 16), (10, 0, 820.464, 1216)),
    ((640, 480), (1024, 1024), None, 64, (640, 448), (640, 480), (0, 16), (21, 0, 618.333, 448)),
    ((1920, 1080), (1024, 1024), None, 64, (1344, 768), (1365, 768), (10, 0), (0, 6, 1344, 762)),
    ((1920, 1080), (512, 512), None, 64, (640, 384), (683, 384), (21, 0), (0, 12, 640, 372)),
    ((3000, 2000), (1024, 1024), None, 32, (1248, 832), (1248, 832), (0, 0), (0, 0, 1248, 832)),
    ((1000, 333), (512, 512), None, 64, (768, 256), (769, 256), (0, 0), (0, 0, 768, 255.744)),
]


@pytest.mark.rows("R43")
@pytest.mark.parametrize(("image", "resolution", "limits", "step", "bucket", "resized", "offset", "ltrb"), WORKED)
def test_worked_examples(image, resolution, limits, step, bucket, resized, offset, ltrb):
    image, resolution = Size(*image), Size(*resolution)
    if limits is None:
        fit = buckets.choose_no_upscale(image, resolution, step)
    else:
        fit = buckets.choose(image, buckets.bucket_sizes(resolution, *limits, step))
    assert fit == (bucket, resized)
    assert tuple((r - b) // 2 for r, b in zip(fit.resized, fit.bucket, strict=True)) == offset
    # The sheet gives three decimals.
    assert buckets.crop_ltrb(fit.bucket, image) == pytest.approx(ltrb, abs=5e-4)


def test_any_image_covers_its_bucket():
    rng = Random(5)
    sizes = buckets.bucket_sizes(square(512), 256, 1024, 64)
    for _ in range(2000):
        image = Size(rng.randint(1, 4000), rng.randint(1, 4000))
        for fit in (buckets.choose(image, sizes), buckets.choose_no_upscale(image, square(512), 64)):
            if fit is None:
                continue
            assert fit.resized.width >= fit.bucket.width >= 64
            assert fit.resized.height >= fit.bucket.height >= 64


def test_no_upscale_never_enlarges_and_keeps_the_area():
    rng = Random(6)
    for _ in range(2000):
        image = Size(rng.randint(64, 3000), rng.randint(64, 3000))
        fit = buckets.choose_no_upscale(image, square(512), 64)
        if fit is not None:
            assert fit.resized.width <= image.width + 1  # the other side is rounded from the aspect ratio
            assert fit.resized.height <= image.height + 1
            assert fit.bucket.width * fit.bucket.height <= 512 * 512


def test_a_large_image_keeps_one_side_at_a_multiple_of_the_step():
    """The side that keeps the aspect ratio better, by the sheet's formula in whole numbers and fractions."""
    area, step, rng, chosen = 512 * 512, 64, Random(7), set()
    for _ in range(500):
        image = Size(rng.randint(600, 3000), rng.randint(600, 3000))
        aspect = Fraction(image.width, image.height)
        near = [math.isqrt(int(4 * area * ratio)) for ratio in (aspect, 1 / aspect)]  # twice the side
        width, height = ((side + 1) // 2 // step * step for side in near)
        sides = {}
        for name, given, ratio in (("width", width, 1 / aspect), ("height", height, aspect)):
            other = int(given * ratio + Fraction(1, 2))
            pair = (given, other) if name == "width" else (other, given)
            cut = [side // step * step for side in pair]
            sides[name] = (abs(Fraction(*cut) - aspect) if cut[1] else None, pair)
        if None in (sides["width"][0], sides["height"][0]):
            continue
        best = "width" if sides["width"][0] < sides["height"][0] else "height"
        chosen.add((best, aspect > 1))
        assert buckets.choose_no_upscale(image, square(512), step).resized == sides[best][1], image
    assert len(chosen) == 4


def test_an_image_of_exactly_the_area_or_of_one_step_stays_as_it_is():
    assert buckets.choose_no_upscale(square(500), square(500), 64) == (square(448), square(500))
    assert buckets.choose_no_upscale(Size(64, 500), square(512), 64) == (Size(64, 448), Size(64, 500))


def test_the_error_is_the_difference_of_the_ratios():
    assert buckets.aspect_error(Size(640, 384), Size(1920, 1080)) == pytest.approx(16 / 9 - 640 / 384)
    assert buckets.aspect_error(Size(384, 640), Size(480, 640)) == pytest.approx(0.15)


@pytest.mark.parametrize("image", [(63, 500), (500, 1), (1, 1), (9000, 40), (100_000, 70), (70, 100_000)])
def test_no_bucket_for_what_is_below_one_step(image):
    assert buckets.choose_no_upscale(Size(*image), square(512), 64) is None


@pytest.mark.rows("R49")
def test_limits_are_rounded_outwards():
    assert buckets.round_limits(300, 1000, 64) == (256, 1024)
    assert buckets.round_limits(256, 1024, 64) == (256, 1024)


@pytest.mark.rows("R37", "R216")
def test_plan_holds_every_item_once_in_batches_of_one_group():
    groups = [([0, 1, 2, 3, 4], 2), ([5, 6], 4), ([7], 1)]
    plan = buckets.plan_batches(groups, Random(1))
    assert sorted(item for batch in plan for item in batch) == list(range(8))
    assert sorted(map(len, plan)) == [1, 1, 2, 2, 2]
    assert all(any(set(batch) <= set(items) for items, _ in groups) for batch in plan)
    assert plan == buckets.plan_batches(groups, Random(1))
    assert plan != buckets.plan_batches(groups, Random(2))


def test_items_and_batches_are_in_random_order():
    (whole,) = buckets.plan_batches([(range(50), 50)], Random(1))
    assert whole != sorted(whole)
    order = [batch[0] for batch in buckets.plan_batches([([item], 1) for item in range(50)], Random(1))]
    assert order != sorted(order)
