"""Buckets as an object, for programs that sort images into them to count steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from library.data.sample.buckets import bucket_sizes, choose, choose_no_upscale, round_limits
from library.types import Size


class BucketManager:
    """Sorts images into the buckets that a training would use.

    `buckets[i]` has what was added to the bucket of size `resos[i]`, in the order of first use.

    Args:
        no_upscale: --bucket_no_upscale.
        max_reso: --resolution as (width, height).
        min_size, max_size, reso_steps: --min_bucket_reso, --max_bucket_reso and --bucket_reso_steps; pixels. They may
            be None where `set_predefined_resos` is called in place of `make_buckets`.
    """

    def __init__(
        self,
        no_upscale: bool,
        max_reso: tuple[int, int],
        min_size: int | None,
        max_size: int | None,
        reso_steps: int | None,
    ):
        self.no_upscale = no_upscale
        self.max_reso, self.min_size, self.max_size, self.reso_steps = Size(*max_reso), min_size, max_size, reso_steps
        self.predefined_resos: list[Size] = []
        self.resos: list[Size] = []
        self.reso_to_id: dict[tuple[int, int], int] = {}
        self.buckets: list[list[Any]] = []

    def make_buckets(self) -> None:
        """Makes every bucket of the resolution. Not needed with `no_upscale`, where images make their own."""
        low, high = round_limits(self.min_size, self.max_size, self.reso_steps)
        self.set_predefined_resos(bucket_sizes(self.max_reso, low, high, self.reso_steps))

    def set_predefined_resos(self, resos: Iterable[tuple[int, int]]) -> None:
        self.predefined_resos = [Size(*reso) for reso in resos]

    def select_bucket(self, image_width: int, image_height: int) -> tuple[Size, Size, float]:
        """The bucket's size, the size that the image is resized to, and by how much their aspect ratios differ.

        Raises: ValueError: with `no_upscale`, a side of the image is below `reso_steps`; a training leaves it out.
        """
        image = Size(image_width, image_height)
        if self.no_upscale:
            fit = choose_no_upscale(image, self.max_reso, self.reso_steps)
            if fit is None:
                raise ValueError(f"an image of {image_width}x{image_height} fits into no bucket of {self.reso_steps}")
        else:
            fit = choose(image, self.predefined_resos)
        self.add_if_new_reso(fit.bucket)
        return fit.bucket, fit.resized, fit.bucket.width / fit.bucket.height - image.width / image.height

    def add_if_new_reso(self, reso: tuple[int, int]) -> None:
        if reso not in self.reso_to_id:
            self.reso_to_id[reso] = len(self.resos)
            self.resos.append(Size(*reso))
            self.buckets.append([])

    def add_image(self, reso: tuple[int, int], image: Any) -> None:
        """Puts `image`, which may be anything, into the bucket that `select_bucket` gave."""
        self.buckets[self.reso_to_id[reso]].append(image)
