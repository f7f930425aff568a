"""A record's files to what the model is to see: the image, its transparency, its masks and its control image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from library.data.sample import buckets, images
from library.data.sample.images import Crop
from library.errors import UserError
from library.types import Size

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from library.data.types import Record

Read = TypeVar("Read")

BRIGHT = 128  # value from which a mask says that something is to be drawn
SPARE = 4  # times the size that is wanted is how large an image is decoded at least, to be shrunk well from there


class View(NamedTuple):
    """One look at a record. All parts have the same crop, and are mirrored together."""

    pixels: NDArray[np.uint8]  # (bucket height, bucket width, 3)
    alpha: NDArray[np.uint8] | None  # (bucket height, bucket width): opacity; only with alpha_mask
    mask: NDArray[np.uint8] | None  # (bucket height, bucket width, 3), where the record has one
    control: NDArray[np.uint8] | None  # (bucket height, bucket width, 3), where the record has one
    inpainting_mask: NDArray[np.uint8] | None = None  # (bucket height, bucket width), where the record has one


def render(record: Record, flip: bool, rng: Random) -> View:
    """The record's image as the model is to see it, and what goes with it.

    A JPEG file that is shrunk to an eighth or less may be decoded at a fraction of its size, see `images.read_reduced`.
    With alpha_mask the colours are those stored under the transparency; without, white shows through it.

    Args:
        rng: decides over the random cuts and colours that the subset asks for.

    Raises: UserError: a file cannot be read, or the image has another size than the record says.
    """
    subset = record.subset
    alpha = None
    crop = _crop(record, rng)
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
        alpha = images.apply_crop_to_values(alpha, crop)
    mask, control, inpainting = (_values(path, crop) for path in (record.mask, record.control, record.inpainting_mask))
    if subset.color_aug:
        pixels = images.vary_colours(pixels, rng)
    view = View(pixels, alpha, mask, control, None if inpainting is None else inpainting.max(axis=2))
    return View(*(None if part is None else part[:, ::-1] for part in view)) if flip else view


def render_control(record: Record, flip: bool) -> NDArray[np.uint8] | None:
    """The control image alone, (bucket height, bucket width, 3), as `render` gives it where nothing is random.

    That is so wherever latents are cached: `build_specs` refuses random crops there.

    Raises: UserError: the file cannot be read.
    """
    control = _values(record.control, _crop(record, Random(0)))
    return control[:, ::-1] if control is not None and flip else control


def _values(path: Path | None, crop: Crop) -> NDArray[np.uint8] | None:
    return None if path is None else images.apply_crop_to_values(_read(images.read_values, path), crop)


def _read(read: Callable[[Path], Read], path: Path) -> Read:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the image cannot be read ({images.reason(error)}); replace or remove it") from None


def _crop(record: Record, rng: Random) -> Crop:
    subset = record.subset
    face = images.face_box(record.path) if subset.face_crop_aug_range and record.resized is None else None
    if face is not None:
        span = subset.face_crop_aug_range
        return images.face_crop(record.size, face, record.bucket, span, rng, subset.random_crop)
    resized = record.resized or record.size
    if subset.random_crop:
        return images.random_crop(resized, record.bucket, rng)
    return images.centre_crop(resized, record.bucket)


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

    It is the opacity, or the red channel of the mask, or where both are there their product.
    """
    alpha = None if view.alpha is None else to_mask(view.alpha)
    red = None if view.mask is None else to_mask(view.mask[..., 0])
    if alpha is None or red is None:
        return red if alpha is None else alpha
    return alpha * red
