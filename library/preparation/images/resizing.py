"""Images in smaller sizes, for trainings at several resolutions: tools/resize_images_to_resolution.py."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from library.data.sample import images
from library.data.sample.images import Crop
from library.data.sample.opencv import opencv
from library.data.scan.folders import is_image
from library.errors import UserError
from library.options.base import Options
from library.options.image_tools import ResizingOptions, parse_sizes
from library.options.preparation import WorkOptions
from library.preparation.common.images import find_images, my_share, read_ahead
from library.preparation.common.summary import Outcome
from library.preparation.images.image_files import WriteError, encoded, is_written, make_folder, write_file
from library.runtime.files import read_bytes
from library.types import Size

if TYPE_CHECKING:
    pass

GROUPS = (ResizingOptions, WorkOptions)


def resize_images(opts: Options) -> Outcome:
    """Writes every image of a folder in every size of --max_resolution."""
    opencv()
    given = opts.resizing
    source, target = Path(given.src_img_folder), Path(given.dst_img_folder)
    images = find_images(source, recursive=False)
    make_folder(target)
    if target.samefile(source):
        raise UserError(f"{target}: give another folder for the results, or the next run would resize them too")
    names = sorted(entry.name for entry in os.scandir(source) if entry.is_file())
    sizes = parse_sizes(given.max_resolution)
    outcome = Outcome()

    def work(path: Path) -> bool | WriteError:
        try:
            return _resize_file(path, target, sizes, names if given.copy_associated_files else (), given)
        except WriteError as error:
            return error

    todo = my_share(without_namesakes(images, outcome))
    workers = given.max_data_loader_n_workers
    for _, done in read_ahead(todo, work, outcome, workers=workers, desc="resizing"):
        if isinstance(done, WriteError):
            raise UserError(str(done))
        outcome.done += done
        outcome.skipped += not done
    return outcome


def fit(size: Size, most: Size, divisible_by: int) -> Crop:
    """The resize and crop of an image of `size` to at most as many pixels as `most`, at its own aspect ratio.

    Raises: ValueError: nothing is left of one side that could be divided by `divisible_by`.
    """
    pixels, allowed = size.width * size.height, most.width * most.height
    resized = size
    if pixels > allowed:
        # floor(side * sqrt(allowed / pixels)), in whole numbers: 1000 must not become 511 instead of 512
        resized = Size(*(max(1, isqrt(side * side * allowed // pixels)) for side in size))
    to = Size(*(side - side % divisible_by for side in resized))
    if min(to) == 0:
        raise ValueError(f"{resized.width}x{resized.height} pixels are too few for --divisible_by={divisible_by}")
    return images.centre_crop(resized, to)


def result_name(image: str, size: Size, suffix: str) -> str:
    """The file name of a result: ``a.b.png`` in 512x384 as ``a.b+512x384.jpg``."""
    return f"{os.path.splitext(image)[0]}+{size.width}x{size.height}{suffix}"


def companions(image: str, names: Sequence[str]) -> list[str]:
    """The files beside an image that have its name but for the ending; neither images nor caches (.npz)."""
    stem = os.path.splitext(image)[0]
    return [
        name
        for name in names
        if os.path.splitext(name)[0] == stem and not is_image(name) and not name.lower().endswith(".npz")
    ]


def without_namesakes(images: Sequence[Path], outcome: Outcome) -> list[Path]:
    """The images less those whose results would have the names of an earlier one's, as of a.jpg and a.png."""
    first: dict[str, Path] = {}
    for path in images:
        other = first.setdefault(os.path.normcase(path.stem), path)
        if other is not path:
            outcome.fail(path, f"the results would have the names of those of {other.name}; rename one of them")
    return list(first.values())


def _resize_file(path: Path, target: Path, sizes: Sequence[Size], names: Sequence[str], given: ResizingOptions) -> bool:
    """Returns: False where everything is there already, with --skip_existing."""
    suffix = ".png" if given.save_as_png else ".jpg"
    results = {size: target / result_name(path.name, size, suffix) for size in sizes}
    if given.skip_existing:
        results = {size: file for size, file in results.items() if not is_written(file)}
    if not results:
        return False
    planes = [images.read_image(path)] if not given.save_as_png else list(images.read_image_and_alpha(path))
    if len(planes) == 2 and planes[1].min() == 255:
        planes.pop()  # opaque all over
    interpolation = "lanczos" if given.interpolation == "lanczos4" else given.interpolation
    height, width = planes[0].shape[:2]
    for size, file in results.items():
        crop = fit(Size(width, height), size, given.divisible_by)
        fitted = [images.apply_crop(plane, crop, interpolation) for plane in planes]
        content = encoded(fitted[0] if len(fitted) == 1 else np.dstack(fitted), suffix)
        for name in companions(path.name, names):
            copy = target / result_name(name, size, os.path.splitext(name)[1])
            write_file(copy, read_bytes(path.parent / name))
        write_file(file, content)  # last: where it is there, the rest is too
    return True
