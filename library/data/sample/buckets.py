"""Aspect-ratio buckets: which sizes exist, which one an image goes to, how it is cropped. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from library.types import Size


class Fit(NamedTuple):
    """The bucket of an image, which is resized to `resized`, covering `bucket`, and then cropped to it."""

    bucket: Size
    resized: Size


def round_limits(low: int, high: int, step: int) -> tuple[int, int]:
    """Bucket limits as multiples of `step`: the lower rounded down, the upper rounded up. Pixels."""
    return low // step * step, -(-high // step) * step


def bucket_sizes(resolution: Size, low: int, high: int, step: int) -> list[Size]:
    """Every bucket of a resolution, sorted. No side leaves [low, high]; no area exceeds the resolution's.

    Args:
        low, high: limits of a side in pixels, multiples of `step`; `low` is at least `step`.
    """
    area = resolution.width * resolution.height
    square = math.isqrt(area) // step * step
    sizes = {Size(square, square)}
    for width in range(low, high + 1, step):
        height = min(high, area // width // step * step)
        if height >= low:
            sizes |= {Size(width, height), Size(height, width)}
    return sorted(sizes)


def choose(image: Size, sizes: Sequence[Size]) -> Fit:
    """The bucket of nearest aspect ratio (the first one on a tie); small images are enlarged to it."""
    aspect = image.width / image.height
    bucket = image if image in sizes else min(sizes, key=lambda size: abs(size.width / size.height - aspect))
    if aspect > bucket.width / bucket.height:
        scale = bucket.height / image.height
    else:
        scale = bucket.width / image.width
    return Fit(bucket, Size(_round(image.width * scale), _round(image.height * scale)))


def choose_no_upscale(image: Size, resolution: Size, step: int) -> Fit | None:
    """A bucket made for the image: shrunk to the resolution's area where larger, else as it is; never enlarged.

    Returns: None where a side of the image is below `step`, so that no bucket is small enough.
    """
    resized = image
    area, aspect = resolution.width * resolution.height, image.width / image.height
    if image.width * image.height > area:
        # One side is a multiple of `step` exactly: the one that keeps the aspect ratio better.
        width = _round(math.sqrt(area * aspect)) // step * step
        height = _round(area / math.sqrt(area * aspect)) // step * step
        height_of_width = _round(width / aspect) // step * step
        width_of_height = _round(height * aspect) // step * step
        if 0 in (width, height, height_of_width):
            return None
        if abs(width / height_of_width - aspect) < abs(width_of_height / height - aspect):
            resized = Size(width, _round(width / aspect))
        else:
            resized = Size(_round(height * aspect), height)
    if min(resized) < step:
        return None
    return Fit(Size(resized.width // step * step, resized.height // step * step), resized)


def _round(value: float) -> int:
    """Half up; Python's round() goes to the even number."""
    return math.floor(value + 0.5)


def crop_ltrb(bucket: Size, image: Size) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) as in caches and SDXL's conditioning: where the whole image would lie in the bucket.

    It is the letter-box position, not the offset that the crop really had; files in circulation hold this value.
    """
    aspect = image.width / image.height
    if bucket.width / bucket.height > aspect:
        width, height = min(bucket.height * aspect, bucket.width), float(bucket.height)
    else:
        width, height = float(bucket.width), min(bucket.width / aspect, bucket.height)
    left, top = (bucket.width - width) // 2, (bucket.height - height) // 2
    return left, top, left + width, top + height


def aspect_error(bucket: Size, image: Size) -> float:
    """The absolute difference of width / height between bucket and image."""
    return abs(bucket.width / bucket.height - image.width / image.height)


def plan_batches(groups: Sequence[tuple[Sequence[int], int]], rng: Random) -> list[list[int]]:
    """One epoch: every item once, in batches of one group each, all in random order.

    Args:
        groups: (items, batch size) of every bucket; a group's last batch may be short.
    """
    batches = []
    for items, batch_size in groups:
        shuffled = list(items)
        rng.shuffle(shuffled)
        batches += [shuffled[at : at + batch_size] for at in range(0, len(shuffled), batch_size)]
    rng.shuffle(batches)
    return batches
