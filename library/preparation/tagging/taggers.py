"""A tagger: its labels, how it wants to see an image, and ONNX Runtime that runs it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from library.data.sample.images import read_reduced, resize
from library.errors import UserError
from library.preparation.common.onnx_sessions import first_line, is_on_gpu, open_session
from library.preparation.tagging.tag_rules import CATEGORIES, Label
from library.preparation.tagging.tagger_files import TaggerFiles
from library.runtime.documents import LARGEST_CONFIG, NotTextError, decode, load_json
from library.runtime.files import read_bytes, reason
from library.runtime.logs import LOGGER
from library.screen import counted
from library.types import Size

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WHITE = 255
_LONGEST = 8192  # pixels of a side, of what is made square as it is: a long strip would need all memory
_SPARE = 4  # times the tagger's image is how large a decoded one is at least, to be placed exactly enough
_SIDES = {"table": 448, "mapping": 448, "list": 512}  # in pixels, where the model takes any
_BY_NUMBER = {"0": "general", "1": "artist", "3": "copyright", "4": "character", "5": "meta", "9": "rating"}
_SHOWN = 5  # categories that are not known, in a warning
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Tagger:
    """A tagger that is ready to run."""

    files: TaggerFiles
    labels: tuple[Label, ...]  # in the order of the outputs
    size: Size  # of the images that it sees, in pixels
    planes: bool  # takes (N, 3, H, W), instead of (N, H, W, 3)
    batch: int | None  # images that it takes at a time; None: any number
    dtype: type[np.floating[Any]]
    session: Any  # onnxruntime.InferenceSession

    @property
    def ranked(self) -> bool:
        """Whether its tags are written by falling probability."""
        return self.files.kind == "mapping"

    @property
    def on_gpu(self) -> bool:
        return is_on_gpu(self.session)


def open_tagger(files: TaggerFiles) -> Tagger:
    """Raises: UserError: a file is damaged, or model and labels do not belong together."""
    labels = read_labels(files)
    session = open_session(files.path, "get it again; --force_download does so for a tagger of Hugging Face")
    taken, given = session.get_inputs()[0], session.get_outputs()[0]
    shape = taken.shape
    planes = len(shape) == 4 and shape[1] == 3 and shape[3] != 3
    channels = shape[1 if planes else 3] if len(shape) == 4 else 0
    if taken.type not in _TYPES or (isinstance(channels, int) and channels != 3):
        raise UserError(f"{files.path}: no tagger; it takes {taken.type} of shape {shape} and not images")
    outputs = given.shape[-1]
    if isinstance(outputs, int) and outputs != len(labels):
        raise UserError(
            f"{files.path} has {counted(outputs, 'output')} and {files.labels} has {counted(len(labels), 'label')}; "
            "they belong to two models"
        )
    sides = shape[2:] if planes else shape[1:3]
    height, width = (side if isinstance(side, int) and side > 0 else _SIDES[files.kind] for side in sides)
    batch = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None
    return Tagger(files, labels, Size(width, height), planes, batch, _TYPES[taken.type], session)


# ---- labels


def read_labels(files: TaggerFiles) -> tuple[Label, ...]:
    """The labels of the outputs, in their order. Raises: UserError: the file is damaged."""
    path = files.folder / files.labels
    readers = {"table": _from_table, "mapping": _from_mapping, "list": _from_list}
    labels = [Label(name, category.lower()) for name, category in readers[files.kind](_read(path), path)]
    unknown = list(dict.fromkeys(label.category for label in labels if label.category not in CATEGORIES))
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        LOGGER.warning(
            "%s: tags of unknown categories are treated as general: %s%s",
            path, ", ".join(unknown[:_SHOWN]), more,
        )  # fmt: skip
    return tuple(label if label.category in CATEGORIES else Label(label.name, "general") for label in labels)


def _read(path: Path) -> str:
    try:
        return decode(read_bytes(path, LARGEST_CONFIG))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    except NotTextError as error:
        raise UserError(f"{path}: {error}; download the tagger again") from None


def _from_table(text: str, path: Path) -> Iterable[Label]:
    """tag_id,name,category,count"""
    for row in csv.DictReader(io.StringIO(text, newline="")):
        if not row.get("name") or row.get("category") is None:
            raise UserError(f"{path}: every line needs a name and a category; download the tagger again")
        number = row["category"].strip()
        yield Label(row["name"], _BY_NUMBER.get(number, number))


def _from_mapping(text: str, path: Path) -> Iterable[Label]:
    """{"0": {"tag": "...", "category": "General"}, ...}"""
    try:
        rows = {int(number): (row["tag"], row["category"]) for number, row in load_json(text).items()}
        if not all(isinstance(word, str) for pair in rows.values() for word in pair):
            raise TypeError("a tag and a category are words")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f'{path}: must hold an object {{"0": {{"tag": ..., "category": ...}}, ...}}; download the tagger again'
        ) from None
    if sorted(rows) != list(range(len(rows))):
        raise UserError(f"{path}: its numbers are not 0 to {len(rows) - 1}; download the tagger again")
    for number in range(len(rows)):
        tag, category = rows[number]
        yield Label(tag, category)


def _from_list(text: str, path: Path) -> Iterable[Label]:
    """One tag per line; ratings are called rating:..., and tags-character.txt lists the characters."""
    beside = path.parent / "tags-character.txt"
    characters = frozenset(_lines(_read(beside))) if beside.is_file() else frozenset()
    for name in _lines(text):
        if name.startswith("rating:"):
            yield Label(name, "rating")
        else:
            yield Label(name, "character" if name in characters else "general")


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


# ---- images


def read_pixels(path: Path, tagger: Tagger) -> tuple[NDArray[np.floating[Any]], Size]:
    """An image as the tagger sees it, and its own size in pixels.

    Large JPEG files are decoded at a fraction of their size, see `read_reduced`. What the tagger sees differs from the
    whole image by less than one level of 255 on average.

    Returns: (H, W, 3) or (3, H, W) in the tagger's float type.
    Raises: OSError or ValueError: it cannot be read.
    """
    image, size = read_reduced(path, lambda whole: _fitted(whole, tagger.size, _SPARE))
    return to_input(image, tagger, size), size


def to_input(image: NDArray[np.uint8], tagger: Tagger, whole: Size | None = None) -> NDArray[np.floating[Any]]:
    """RGB (H, W, 3) to what the model takes.

    "table": BGR from 0 to 255; "mapping": BGR from -1 to 1; both padded to a square with white. "list": RGB from 0 to
    1, with the colours of the image's edges around it.

    Args:
        whole: the image's own size, where it was decoded smaller.
    """
    whole = whole or Size(image.shape[1], image.shape[0])
    if tagger.files.kind == "list":
        size = tagger.size
        inner = _fitted(whole, size)
        top, left = (size.height - inner.height) // 2, (size.width - inner.width) // 2
        below, right = size.height - inner.height - top, size.width - inner.width - left
        framed = np.pad(resize(image, inner, "area"), ((top, below), (left, right), (0, 0)), mode="edge")
        pixels = _laid_out(framed, (0, 1, 2), tagger.planes)
        pixels /= np.float32(255)
    else:
        pixels = _laid_out(resize(_squared(image, whole), tagger.size), (2, 1, 0), tagger.planes)
        if tagger.files.kind == "mapping":
            pixels /= np.float32(127.5)
            pixels -= np.float32(1)
    return pixels.astype(tagger.dtype, copy=False)


def _laid_out(image: NDArray[np.uint8], channels: Sequence[int], planes: bool) -> NDArray[np.float32]:
    """The chosen channels of (H, W, 3) in their new order; (3, H, W) with `planes`, else (H, W, 3)."""
    height, width = image.shape[:2]
    out = np.empty((3, height, width) if planes else (height, width, 3), np.float32)
    for place, channel in enumerate(channels):
        (out[place] if planes else out[..., place])[...] = image[..., channel]  # numpy is slow at doing all at once
    return out


def _squared(image: NDArray[np.uint8], whole: Size) -> NDArray[np.uint8]:
    """The image at the centre of a white square; an odd row or column of padding is below or to the right."""
    height, width = image.shape[:2]
    if height == width:
        return image
    side = max(height, width)
    if side > _LONGEST:
        return _squared(resize(image, _fitted(Size(width, height), Size(_LONGEST, _LONGEST))), whole)
    square = np.full((side, side, 3), _WHITE, np.uint8)
    # Where the whole image would be: one that was decoded smaller may have a broken row more.
    scale = side / max(whole)
    top = min(side - height, floor((max(whole) - whole.height) // 2 * scale + 0.5))
    left = min(side - width, floor((max(whole) - whole.width) // 2 * scale + 0.5))
    square[top : top + height, left : left + width] = image
    return square


def _fitted(image: Size, frame: Size, times: int = 1) -> Size:
    """The size at which all of an image just fits into a frame, or into one so many times as large."""
    scale = times * min(frame.width / image.width, frame.height / image.height)
    return Size(max(1, floor(image.width * scale + 0.5)), max(1, floor(image.height * scale + 0.5)))


def probabilities(pixels: Sequence[NDArray[np.floating[Any]]], tagger: Tagger) -> NDArray[np.float32]:
    """Runs the model.

    Args:
        pixels: as `read_pixels` gives them, any number from 1.

    Returns: (images, labels), from 0 to 1.
    Raises: UserError: the model cannot be run, e.g. for lack of memory.
    """
    size = tagger.batch or len(pixels)
    outputs, inputs = [tagger.session.get_outputs()[0].name], tagger.session.get_inputs()[0].name
    parts = []
    for start in range(0, len(pixels), size):
        batch = np.stack(pixels[start : start + size])
        count = len(batch)
        if count < size:  # a model of a fixed size
            batch = np.pad(batch, ((0, size - count), (0, 0), (0, 0), (0, 0)))
        try:
            (given,) = tagger.session.run(outputs, {inputs: batch})
        except Exception as error:  # of its own kinds, which have no common base
            raise UserError(
                f"{tagger.files.path}: the model cannot be run: {first_line(error)}",
                hint="if memory is short, lower --batch_size",
            ) from None
        found = np.asarray(given[:count], dtype=np.float32).reshape(count, -1)
        if found.shape[1] != len(tagger.labels):
            said, labels = counted(found.shape[1], "output"), counted(len(tagger.labels), "label")
            raise UserError(f"{tagger.files.path} has {said} for {labels}")
        parts.append(0.5 * (1 + np.tanh(0.5 * found)) if tagger.files.kind == "mapping" else found)  # a sigmoid
    return np.concatenate(parts)
