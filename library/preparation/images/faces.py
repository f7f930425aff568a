"""Cuts images around the faces in them, for --face_crop_aug_range and the like: tools/detect_face_rotate.py."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from library.data.sample import images
from library.data.sample.images import Crop, FaceBox
from library.data.sample.opencv import opencv
from library.errors import UserError
from library.options.base import Options
from library.options.image_tools import FaceOptions
from library.options.preparation import WorkOptions
from library.preparation.common.images import find_images, my_share, read_ahead
from library.preparation.common.summary import Outcome
from library.preparation.images.face_models import Face, FaceModel
from library.preparation.images.image_files import (
    WriteError,
    encoded,
    is_written,
    make_folder,
    writable_suffix,
    write_file,
)
from library.runtime.logs import LOGGER
from library.screen import counted
from library.types import Size

if TYPE_CHECKING:
    from numpy.typing import NDArray

GROUPS = (FaceOptions, WorkOptions)
_MOST_PIXELS = 10**8  # of an image that is enlarged for the sake of its face
_LONGEST_TURNED = 32766  # pixels of a side: OpenCV counts them with 16 bits here
_LEAST_SURE = 0.05  # below, it is not reported
_BOX, _EYE = (255, 0, 0), (0, 0, 255)  # RGB of what --debug draws


class Framing(NamedTuple):
    """The resize and crop of a result. At most one of `pixels` and `times` is given; without, nothing is cropped."""

    face_side: int | None = None  # pixels of the face's longer side
    pixels: Size | None = None  # of the cut
    times: tuple[float, float] | None = None  # width and height of the crop, in longer sides of the face
    fit: bool = False  # the crop takes all of the image's shorter side


def cut_faces(opts: Options) -> Outcome:
    """Writes the images of --src_dir, or the parts around their faces, to --dst_dir."""
    opencv()
    given = opts.faces
    source, target = Path(given.src_dir), Path(given.dst_dir)
    paths = find_images(source, recursive=False)
    make_folder(target)
    if target.samefile(source):
        raise UserError(f"--dst_dir={target}: give another folder for the results, or the next run would cut them")
    model = FaceModel(given.model)
    if given.rotate and not model.finds_eyes:
        raise UserError(f"--rotate needs a model that finds eyes, as YuNet does; {given.model} finds boxes only")
    outcome = Outcome()
    todo = my_share(paths)
    if given.skip_existing:
        there = set()  # (stem, suffix) of the images that have a result
        for entry in os.scandir(target):
            path = Path(entry.name)
            if images.face_box(path) is not None and is_written(Path(entry.path)):
                there.add((path.stem.rsplit("_", 4)[0], path.suffix))
        left = [path for path in todo if (path.stem, writable_suffix(path.suffix)) not in there]
        outcome.skipped += len(todo) - len(left)
        todo = left
    workers = given.max_data_loader_n_workers
    without = 0
    for path, pixels in read_ahead(todo, images.read_image, outcome, workers=workers, desc="finding faces"):
        try:
            results = _cut_file(path, pixels, model, given)
            for name, content in results:
                write_file(target / name, content)
        except WriteError as error:
            raise UserError(str(error)) from None
        except ValueError as error:
            outcome.fail(path, str(error))
            continue
        without += not results
        outcome.done += bool(results)
        outcome.skipped += not results
    if without:
        why = "as no face was found there, or none of the wanted size"
        LOGGER.warning("%s without a result, %s", counted(without), why)
    return outcome


# ---- geometry


def box_of(face: Face, size: Size) -> FaceBox:
    """Centre and size in whole pixels, of the part that lies inside the image."""
    left, right = (min(max(x, 0.0), size.width) for x in (face.left, face.right))
    top, bottom = (min(max(y, 0.0), size.height) for y in (face.top, face.bottom))
    return FaceBox(_whole((left + right) / 2), _whole((top + bottom) / 2), _whole(right - left), _whole(bottom - top))


def tilt(eyes: tuple[tuple[float, float], tuple[float, float]]) -> float:
    """The angle in degrees by which the eye line falls to the right; 0 if it is level, -90..90."""
    (left, top), (right, bottom) = eyes
    return math.degrees(math.atan2(bottom - top, right - left))


def turning(centre: tuple[float, float], degrees: float) -> NDArray[np.float64]:
    """The (2, 3) matrix that turns (x, y, 1) about `centre`, against the clock as one sees it."""
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = centre
    return np.array([[cos, sin, x - cos * x - sin * y], [-sin, cos, y + sin * x - cos * y]])


def frame(size: Size, face: FaceBox, framing: Framing) -> tuple[Crop, FaceBox]:
    """The crop of an image that becomes the result, and the face's box in it.

    The crop has the face in its middle, or as near to that as the image's edges allow. An image that is too small
    for `framing.pixels` is enlarged, so that the result always has that size.
    """
    face_side = max(face.width, face.height, 1)
    scale, crop = 1.0, framing.pixels
    if crop is not None:
        covers = max(crop.width / size.width, crop.height / size.height)
        wanted = 1.0 if framing.face_side is None else framing.face_side / face_side
        scale = covers if framing.fit else max(covers, wanted)
    elif framing.face_side is not None:
        scale = framing.face_side / face_side
    elif framing.times is not None:
        crop = Size(*(max(1, _whole(times * face_side)) for times in framing.times))
    resized = Size(*(max(1, _whole(side * scale)) for side in size))
    if framing.pixels is not None:  # rounding must not make it too small
        resized = Size(*(max(side, least) for side, least in zip(resized, framing.pixels, strict=True)))
    to = resized if crop is None else Size(*(min(pair) for pair in zip(crop, resized, strict=True)))
    scaled = FaceBox(*(_whole(value * scale) for value in face))
    left, top = (
        max(0, min(centre - side // 2, whole - side))
        for centre, side, whole in zip((scaled.x, scaled.y), to, resized, strict=True)
    )
    return Crop(resized, left, top, to), scaled._replace(x=scaled.x - left, y=scaled.y - top)


def result_name(stem: str, face: FaceBox, suffix: str) -> str:
    """``<stem>_<cx>_<cy>_<w>_<h><suffix>``, as `library.data.sample.images.face_box` reads it."""
    return f"{stem}_{'_'.join(f'{value:04d}' for value in face)}{suffix}"


def _whole(value: float) -> int:
    return math.floor(value + 0.5)


# ---- files


def _cut_file(path: Path, pixels: NDArray[np.uint8], model: FaceModel, given: FaceOptions) -> list[tuple[str, bytes]]:
    """(name, content) of the results of an image, one for each wanted face, largest first. Logs why there are none.

    Raises: ValueError: a result would be too large, or cannot be written as a file of its kind.
    """
    candidates = model.find(pixels, min(_LEAST_SURE, given.score_threshold))
    sure = [face for face in candidates if face.score >= given.score_threshold]
    if not sure:
        best = max((face.score for face in candidates), default=None)
        hint = "" if best is None else f" (the model's surest guess has {best:.2f}, below --score_threshold)"
        LOGGER.info("%s: no face%s", path, hint)
        return []
    boxes = [box_of(face, Size(pixels.shape[1], pixels.shape[0])) for face in sure]
    sides = [max(box.width, box.height) for box in boxes]
    least, limit = given.min_size or 0, given.max_size or math.inf
    wanted = [face for face, side in zip(sure, sides, strict=True) if least <= side < limit]
    if not wanted:
        LOGGER.info("%s: no face of a wanted size, but of %s pixels", path, ", ".join(map(str, sides)))
    suffix = writable_suffix(path.suffix)
    results: dict[str, bytes] = {}
    for face in wanted if given.multiple_faces else wanted[:1]:
        result, box = _result(pixels, face, given)
        name, number = result_name(path.stem, box, suffix), 2
        while name in results:  # cropped to one size, two faces may well be at the same place
            name, number = result_name(f"{path.stem}_{number}", box, suffix), number + 1
        results[name] = encoded(result, suffix)
    return list(results.items())


def _result(pixels: NDArray[np.uint8], face: Face, given: FaceOptions) -> tuple[NDArray[np.uint8], FaceBox]:
    """The image around a face, and the face's box in it.

    Raises: ValueError: the face is so small that what it is to become would not fit into memory, or the image is too
        long to be turned.
    """
    cv2, size = opencv(), Size(pixels.shape[1], pixels.shape[0])
    box = box_of(face, size)
    eyes = face.eyes
    if given.rotate and eyes is not None:
        if max(size) > _LONGEST_TURNED:
            raise ValueError(
                f"{size.width}x{size.height} is too long for --rotate, which takes {_LONGEST_TURNED} pixels at most"
            )
        matrix = turning((box.x, box.y), tilt(eyes))
        border = cv2.BORDER_REPLICATE
        pixels = cv2.warpAffine(pixels, matrix, size, flags=cv2.INTER_LANCZOS4, borderMode=border)
        first, second = (tuple(map(float, matrix @ (x, y, 1))) for x, y in eyes)
        eyes = ((first[0], first[1]), (second[0], second[1]))
    framing = Framing(given.resize_face_size, given.crop_pixels(), given.crop_times(), given.resize_fit)
    crop, placed = frame(size, box, framing)
    if crop.resized.width * crop.resized.height > _MOST_PIXELS:
        raise ValueError(
            f"for its face of {max(box.width, box.height)} pixels it would become "
            f"{crop.resized.width}x{crop.resized.height}; leave out such faces with --min_size"
        )
    result = images.apply_crop(pixels, crop)
    if given.debug:
        factors = (crop.resized.width / size.width, crop.resized.height / size.height)
        points = [(_whole(x * factors[0]) - crop.left, _whole(y * factors[1]) - crop.top) for x, y in eyes or ()]
        result = np.ascontiguousarray(result).copy()
        line = max(1, min(result.shape[:2]) // 200)
        start = (placed.x - placed.width // 2, placed.y - placed.height // 2)
        cv2.rectangle(result, start, (start[0] + placed.width, start[1] + placed.height), _BOX, line)
        for eye in points:
            cv2.circle(result, eye, 2 * line, _EYE, -1)
    return result, placed
