"""Contact sheets for --debug_dataset: images, masks and captions as training would see them, on PNG pages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from library.data.report.text_drawing import TEXT, length, shorten, step, without_face, wrap, write
from library.data.sample import images
from library.data.types import ItemKey
from library.errors import UserError
from library.runtime.durable import replacing
from library.runtime.logs import LOGGER, progress
from library.types import Size

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from library.data.sample.dataset import TrainingData
    from library.data.types import Record

_NAME = re.compile(r"(validation_)?dataset\d+_bucket\d{4,}x\d{4,}_page\d+\.png")  # of a sheet
_MANY = 50  # images from which there is a progress bar
_OPENED = 4  # sheets that `show` opens; viewers leaf through the rest of the folder

# All in pixels.
_SIDE = 256  # longer side of an image, at most
_SLOT = 216  # width of a cell, at least, so that there is room for words
_WIDTH = 1640  # of a sheet, about
_ROWS = 4  # on a page
_MARGIN, _GAP, _CLOSE = 20, 18, 6  # around all, between cells, within one
_TITLE = 20  # height of letters

_PAPER, _EDGE, _BLANK = "#f3f3f1", "#a5a5a0", "#dededa"
_INK, _QUIET, _MARK, _ALARM = "#161616", "#6a6a66", "#1f5fa8", "#b3261e"
_RED = np.array((225, 20, 20), np.float32)  # laid over what a mask leaves out


@dataclass(frozen=True)
class Cell:
    """The image, mask and captions of one record on a sheet."""

    record: Record
    image: NDArray[np.uint8] | None  # (bucket height, bucket width, 3), as in epoch 1; of repeats the first
    mask: NDArray[np.float32] | None  # (bucket height, bucket width) in [0, 1]; None: all of the image counts
    # (bucket height, bucket width, 3): what a ControlNet reads, or a model for inpainting sees of the image
    control: NDArray[np.uint8] | None
    captions: tuple[str, ...]  # of epoch 1, 2, ...
    mirrored: bool
    problem: str = ""  # why there is no image


@dataclass(frozen=True)
class _Page:
    """One sheet of records of one bucket of one dataset."""

    name: str  # of its file
    title: str
    notes: list[str]
    bucket: Size
    names_folders: bool  # in each cell, as there are several
    rows: list[list[int]]  # numbers of records


def write_sheets(data: TrainingData, folder: Path, *, epochs: int = 3, most: int = 400) -> list[Path]:
    """Writes the sheets of a data set, those of images held out after the others, and returns their paths in order.

    There is one sheet per bucket of a dataset, or several pages. Sheets of an earlier call are removed.

    Args:
        epochs: for how many the captions are shown; images are those of epoch 1.
        most: images on all sheets together, evenly from all subsets.

    Raises: UserError: the folder cannot be written to.
    """
    parts = [(data, epochs, "")]
    if data.held_out is not None:
        parts.append((data.held_out, 1, "validation_"))  # validation never leaves epoch 1
    chosen = _choose([part for part, _, _ in parts], most)
    shown, there = sum(map(len, chosen)), len(data.all_records)
    if shown < there:
        LOGGER.info("the contact sheets show %d of %d images, evenly from all subsets", shown, there)
    sheets: list[Path] = []
    strange: set[str] = set()
    try:
        with progress(shown, "contact sheets", unit="images") if shown >= _MANY else nullcontext() as bar:
            for (part, count, prefix), numbers in zip(parts, chosen, strict=True):
                pages = _pages(part, numbers, count, prefix)
                cells = cells_of(part, [number for page in pages for row in page.rows for number in row], count)
                for page in pages:
                    rows = []
                    for row in page.rows:
                        rows.append(list(islice(cells, len(row))))
                        if bar is not None:
                            bar.update(len(row))
                    with replacing(folder / page.name) as temporary:
                        _draw(page, rows).save(temporary, "PNG")
                    sheets.append(folder / page.name)
                    strange.update(without_face(caption for row in rows for cell in row for caption in cell.captions))
        names = {sheet.name for sheet in sheets}
        for path in folder.iterdir():
            if _NAME.fullmatch(path.name) and path.name not in names:
                path.unlink()
    except OSError as error:
        raise UserError(f"{folder}: the contact sheets cannot be written ({error.strerror or error})") from None
    if strange:
        LOGGER.warning(
            "contact sheets: no font on this machine has %s; they are boxes on the sheets, and correct in training",
            " ".join(sorted(strange)[:20]),
        )
    return sheets


def cells_of(data: TrainingData, numbers: Sequence[int], epochs: int) -> Iterator[Cell]:
    """The cells of these records (indices of `data.records`), in this order; each is made when its turn comes.

    Everything is drawn for the same moments as in training with one process. To be used before items carry latents.
    """
    first_items: dict[int, int] = {}
    for item, number in enumerate(data.items.items):
        first_items.setdefault(number, item)
    wanted = {first_items[number] for number in numbers}
    moments: dict[int, list[ItemKey]] = {item: [] for item in wanted}
    for epoch in range(1, epochs + 1):
        for batch in data.loader(epoch, workers=0).batches:
            for item in batch:
                if item.index in wanted:
                    moments[item.index].append(item)
    for number in numbers:
        record, own = data.records[number], moments[first_items[number]]
        captions = tuple(data.items.caption_at(moment) for moment in own)
        if not record.present:
            yield Cell(record, None, None, None, captions, False, "no image here, only its latents")
            continue
        try:
            sample = data.items[own[0]]
        except UserError as error:
            yield Cell(record, None, None, None, captions, False, str(error).removeprefix(f"{record.path}: "))
            continue
        image = as_image((sample.pixels + 1) / 2)
        mask = None if sample.mask is None else sample.mask[0].numpy()
        beside = (
            sample.control if sample.inpainting_mask is None else (sample.pixels * (1 - sample.inpainting_mask) + 1) / 2
        )
        control = None if beside is None else as_image(beside)
        yield Cell(record, image, mask, control, captions, data.items.is_mirrored_at(own[0]))


def as_image(values: Tensor) -> NDArray[np.uint8]:
    """(3, H, W) in [0, 1] to (H, W, 3)."""
    return (values * 255).round().byte().numpy().transpose(1, 2, 0)


# ---- which images, on which page


def _choose(parts: Sequence[TrainingData], most: int) -> list[list[int]]:
    """Numbers of records, for each part: as many of every subset, as far as it has them, from all over it."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for at, part in enumerate(parts):
        for number, record in enumerate(part.records):
            groups.setdefault((at, record.dataset, id(record.subset)), []).append(number)
    chosen: list[list[int]] = [[] for _ in parts]
    left = most
    by_size = sorted(groups.items(), key=lambda group: len(group[1]))
    for done, ((at, _, _), numbers) in enumerate(by_size):
        count = min(len(numbers), left // (len(by_size) - done))
        left -= count
        chosen[at] += [numbers[step * len(numbers) // count] for step in range(count)]
    return [sorted(numbers) for numbers in chosen]


def _pages(data: TrainingData, numbers: Sequence[int], epochs: int, prefix: str) -> list[_Page]:
    groups: dict[tuple[int, Size], list[int]] = {}
    for number in numbers:
        record = data.records[number]
        groups.setdefault((record.dataset, record.bucket), []).append(number)
    pages = []
    dataset_digits = len(str(len(data.specs)))
    for (dataset, bucket), chosen in sorted(groups.items()):
        there = [r for r in data.records if (r.dataset, r.bucket) == (dataset, bucket)]
        notes = _notes(there, len(chosen), data.specs[dataset].batch_size, epochs, prefix)
        several = len({record.path.parent for record in there}) > 1
        columns = _WIDTH // (_slot_width(bucket) + _GAP)
        rows: list[list[int]] = [[]]
        used = 0
        for number in chosen:
            slots = _slots(data.records[number])
            if used + slots > columns:
                rows.append([])
                used = 0
            rows[-1].append(number)
            used += slots
        parts = [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]
        page_digits = len(str(len(parts)))
        for page, part in enumerate(parts, 1):
            name = (
                f"{prefix}dataset{dataset + 1:0{dataset_digits}}"
                f"_bucket{bucket.width:04}x{bucket.height:04}_page{page:0{page_digits}}.png"
            )
            title = f"{'Validation, dataset' if prefix else 'Dataset'} {dataset + 1}, bucket {_times(bucket)}"
            title += f", page {page} of {len(parts)}" if len(parts) > 1 else ""
            pages.append(_Page(name, title, notes, bucket, several, part))
    return pages


def _notes(there: Sequence[Record], shown: int, batch_size: int, epochs: int, prefix: str) -> list[str]:
    """The lines below a sheet's title. `there` is all of the bucket."""
    regular = [record for record in there if record.subset.is_reg]
    counts = _count([record for record in there if not record.subset.is_reg], "image")
    counts += f"; {_count(regular, 'regularisation image')}" if regular else ""
    if prefix:
        how = "As validation sees them."
    elif epochs > 1:
        how = f"Images as in epoch 1, captions as in epochs 1 to {epochs}; a caption that stays the same stands once."
    else:
        how = "Images and captions as in epoch 1."
    if any(_has_mask(record) for record in there):
        how += " The second copy shows the mask: red does not count in the loss."
    if any(record.control is not None for record in there):
        how += " The control image stands last."
    if any(record.subset.inpainting for record in there):
        how += " What the model sees of an image stands last."
    part = [f"A part only: {shown} of the {len(there)} images of this bucket."] if shown < len(there) else []
    return [f"{counts}; batch size {batch_size}", *part, how]


def _count(records: Sequence[Record], what: str) -> str:
    text = f"{len(records)} {what}{'' if len(records) == 1 else 's'}"
    repeated = sum(record.repeats for record in records)
    return text if repeated == len(records) else f"{text}, {repeated} with repeats"


def _times(size: Size) -> str:
    return f"{size.width}x{size.height}"


def _has_mask(record: Record) -> bool:
    return record.mask is not None or record.subset.alpha_mask


def _slots(record: Record) -> int:
    """Columns that a record takes: as many as its image, the copy with the mask and the control image need."""
    panels = 1 + _has_mask(record) + (record.control is not None or record.subset.inpainting)
    width = panels * (_shown_size(record.bucket).width + _CLOSE) - _CLOSE
    return 1 if width <= _slot_width(record.bucket) else panels


def _shown_size(bucket: Size) -> Size:
    scale = min(1.0, _SIDE / max(bucket))
    return Size(max(1, round(bucket.width * scale)), max(1, round(bucket.height * scale)))


def _slot_width(bucket: Size) -> int:
    return max(_SLOT, _shown_size(bucket).width)


# ---- drawing


def _draw(page: _Page, rows: Sequence[Sequence[Cell]]) -> Image.Image:
    size, slot = _shown_size(page.bucket), _slot_width(page.bucket)
    texts = [[_cell_lines(cell, page.names_folders, slot) for cell in row] for row in rows]
    heights = [size.height + _CLOSE + max(map(len, row)) * step(TEXT) for row in texts]
    columns = max(sum(_slots(cell.record) for cell in row) for row in rows)
    inside = max(
        columns * (slot + _GAP) - _GAP,
        length(page.title, _TITLE),
        *(length(note, TEXT + 1) for note in page.notes),
    )
    top = _MARGIN + step(_TITLE) + len(page.notes) * step(TEXT + 1) + _GAP
    sheet = Image.new("RGB", (int(inside) + 2 * _MARGIN, top + sum(heights) + _GAP * (len(rows) - 1) + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    write(pen, _MARGIN, _MARGIN, page.title, _TITLE, _INK)
    for line, note in enumerate(page.notes):
        write(pen, _MARGIN, _MARGIN + step(_TITLE) + line * step(TEXT + 1), note, TEXT + 1, _QUIET)
    for row, lines_of_row, height in zip(rows, texts, heights, strict=True):
        left = _MARGIN
        for cell, lines in zip(row, lines_of_row, strict=True):
            panels = [cell.image]
            if cell.image is not None and cell.mask is not None:
                cover = 0.65 * (1 - cell.mask[..., None])
                panels.append(np.round(cell.image * (1 - cover) + _RED * cover).astype(np.uint8))
            panels += [] if cell.control is None else [cell.control]
            for at, panel in enumerate(panels):  # an image with an edge around it, or a crossed-out place
                start = left + at * (size.width + _CLOSE)
                right, bottom = start + size.width, top + size.height
                pen.rectangle((start - 1, top - 1, right, bottom), fill=_BLANK, outline=_EDGE)
                if panel is None:
                    pen.line((start, top, right - 1, bottom - 1), fill=_EDGE)
                    pen.line((start, bottom - 1, right - 1, top), fill=_EDGE)
                else:
                    sheet.paste(Image.fromarray(images.resize(panel, size)), (start, top))
            for line, (text, colour) in enumerate(lines):
                write(pen, left, top + size.height + _CLOSE + line * step(TEXT), text, TEXT, colour)
            left += _slots(cell.record) * (slot + _GAP)
        top += height + _GAP
    return sheet


def _cell_lines(cell: Cell, with_folder: bool, slot: int) -> list[tuple[str, str]]:
    """(text, colour) of each line below an image."""
    record = cell.record
    width = _slots(record) * (slot + _GAP) - _GAP
    facts = _times(record.size)
    facts += f" to {_times(record.bucket)}" if record.size != record.bucket else ""
    facts += f", {record.repeats} repeats" if record.repeats > 1 else ""
    subset = record.subset
    varied = [name for name in ("random_crop", "color_aug", "face_crop_aug_range") if getattr(subset, name)]
    marks = ["regularisation"] * subset.is_reg + ["mirrored"] * cell.mirrored + varied
    lines = [(shorten(record.path.name, width, 0.6), _INK)]
    if with_folder:
        lines.append((shorten(f"in {record.path.parent.name}", width), _QUIET))
    lines += [(line, _QUIET) for line in wrap(facts, width, 2)]
    lines += [(line, _MARK) for line in wrap(", ".join(marks), width, 2)]
    lines += [(line, _ALARM if record.present else _QUIET) for line in wrap(cell.problem, width, 4)]
    epochs: dict[str, list[str]] = {}
    for epoch, caption in enumerate(cell.captions, 1):
        epochs.setdefault(caption, []).append(str(epoch))
    if len(epochs) == 1:
        return lines + _caption_lines(cell.captions[0], width, 6)
    for caption, when in epochs.items():
        lines.append((shorten(f"epoch{'s' if len(when) > 1 else ''} {', '.join(when)}", width), _QUIET))
        lines += _caption_lines(caption, width, 3)
    return lines


def _caption_lines(caption: str, width: int, most: int) -> list[tuple[str, str]]:
    if not caption.strip():
        return [("(empty caption)", _INK)]
    return [(line, _INK) for line in wrap(caption, width, most)]


# ---- showing


def show(sheets: Sequence[Path], opener: Callable[[Path], None] | None = None) -> None:
    """Opens the first sheets with the system's viewer, where a person sits before a screen. Never waits or fails.

    Args:
        opener: opens one file; None: what the system opens images with.
    """
    try:
        screen = sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        if not screen or sys.stdin is None or not sys.stdin.isatty():
            return
        for sheet in sheets[:_OPENED]:
            if opener is not None:
                opener(sheet)
            elif sys.platform == "win32":
                os.startfile(sheet)
            else:
                program, quiet = "open" if sys.platform == "darwin" else "xdg-open", subprocess.DEVNULL
                subprocess.Popen([program, str(sheet)], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    except Exception as error:  # whatever keeps a viewer from starting: the sheets are there all the same
        LOGGER.debug("the sheets cannot be shown (%s)", error)
