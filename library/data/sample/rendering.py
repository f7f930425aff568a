"""A record's files to what the model is to see: the image, its transparency and the image that belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from library.data.sample import buckets, images
from library.errors import UserError
from library.types import Size

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from library.data.types import Record

Read = TypeVar("Read")

SPARE = 4  # times the size that is wanted is how large an image is decoded at least, to be shrunk well from there


class View(NamedTuple):
    """One look at a record. All parts have the same crop, and are mirrored together."""

    pixels: NDArray[np.uint8]  # (bucket height, bucket width, 3)
    alpha: NDArray[np.uint8] | None  # (bucket height, bucket width): opacity; only with alpha_mask
    extra: NDArray[np.uint8] | None  # (bucket height, bucket width, 3): conditioning image, where the record has one


def render(record: Record, flip: bool, rng: Random) -> View:
    """The record's image as the model is to see it, and what goes with it.

    A JPEG file that is shrunk to an eighth or less may be decoded at a fraction of its size, see `images.read_reduced`.
    With alpha_mask the colours are those stored under the transparency; without, white shows through it.

    Args:
        rng: decides over the random cuts and colours that the subset asks for.

    Raises: UserError: a file cannot be read, or the image has another size than the record says.
    """
    subset = record.subset
    alpha = extra = None
    face = images.face_box(record.path) if subset.face_crop_aug_range and record.resized is None else None
    resized = record.resized or record.size
    if face is not None:
        span = subset.face_crop_aug_range
        crop = images.face_crop(record.size, face, record.bucket, span, rng, subset.random_crop)
    elif subset.random_crop:
        crop = images.random_crop(resized, record.bucket, rng)
    else:
        crop = images.centre_crop(resized, record.bucket)
    if subset.alpha_mask:
        pixels, alpha = _read(images.read_image_and_alpha, record.path)
        size = Size(*pixels.shape[1::-1])
    elif subset.resize_interpolation in (None, "area"):
        enough = Size(SPARE * crop.resized.width, SPARE * crop.resized.height)
        pixels, size = _read(partial(images.read_reduced, enough=lambda _: enough), record.path)
    else:
        pixels = _read(images.read_image, record.path)
        size = Size(*pixels.shape[1::-1])
    if size != record.size:
        raise UserError(
            f"{record.path}: the image has changed since the start of the run, from "
            f"{record.size.width}x{record.size.height} to {size.width}x{size.height}; start the run again"
        )
    pixels = images.apply_crop(pixels, crop, subset.resize_interpolation)
    if alpha is not None:
        alpha = images.apply_crop_to_mask(alpha, crop)
    if record.conditioning is not None:
        extra = images.apply_crop_to_mask(_read(images.read_values, record.conditioning), crop)
    if subset.color_aug:
        pixels = images.vary_colours(pixels, rng)
    view = View(pixels, alpha, extra)
    return View(*(None if part is None else part[:, ::-1] for part in view)) if flip else view


def _read(read: Callable[[Path], Read], path: Path) -> Read:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the image cannot be read ({images.reason(error)}); replace or remove it") from None


def recorded_crop(record: Record, flip: bool) -> tuple[int, int]:
    """(top, left) that SDXL is conditioned on; a mirrored image counts from its other side. See `buckets.crop_ltrb`."""
    frame = record.size if record.resized is not None else record.bucket
    left, top, right, _ = buckets.crop_ltrb(record.bucket, frame)
    return int(top), int(record.bucket.width - right if flip else left)


def to_mask(plane: NDArray[np.uint8]) -> Tensor:
    """uint8 (H, W) to float32 (1, H, W) in [0, 1]."""
    import torch

    return torch.from_numpy(plane.astype(np.float32, order="C"))[None].div_(255)


def loss_mask(view: View) -> Tensor | None:
    """The weight of each pixel in the loss, float32 (1, H, W) in [0, 1]; None: all are 1.

    It is the opacity, or the red channel of the conditioning image, or where both are there their product.
    """
    alpha = None if view.alpha is None else to_mask(view.alpha)
    red = None if view.extra is None else to_mask(view.extra[..., 0])
    if alpha is None or red is None:
        return red if alpha is None else alpha
    return alpha * red
