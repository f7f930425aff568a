"""The contact sheets and the page of --grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from library.data.report.text_drawing import TEXT, length, step, wrap, write
from library.generation.grid import Axis, Cell, sheet_axes
from library.pages.page import data_url, render
from library.runtime.durable import replacing

if TYPE_CHECKING:
    from library.generation.grid import Value

_MARGIN, _GAP = 16, 6  # pixels
_LABEL = 140  # width of labels beside rows in pixels, at most
_SIDE = 512  # pixels of an image's longer side on a sheet, at most
_PAPER, _INK, _QUIET = "#ffffff", "#1a1a1a", "#666666"
_TITLE = 16


@dataclass(frozen=True)
class Shown:
    """A cell with its image's file and what that says."""

    cell: Cell
    path: Path
    settings: str  # in lines, for people


@dataclass(frozen=True)
class Sheet:
    title: str
    rows: tuple[Value, ...]
    columns: tuple[Value, ...]
    images: Mapping[tuple[int, int], Shown]  # by row and column


def sheets_of(axes: Sequence[Axis], shown: Sequence[Shown]) -> list[Sheet]:
    """The images by sheets; each has one combination of the axes that are neither its rows nor its columns."""
    row_axis, column_axis = sheet_axes(axes)
    of_sheet = {axis.name for axis in (row_axis, column_axis) if axis is not None}
    found: dict[tuple[str, ...], dict[tuple[int, int], Shown]] = {}
    for one in shown:
        labels = one.cell.labels(axes)
        rest = tuple(f"{name}: {label}" for name, label in labels.items() if name not in of_sheet)
        place = tuple(
            0 if axis is None else axis.values.index(one.cell.values[list(axes).index(axis)])
            for axis in (row_axis, column_axis)
        )
        found.setdefault(rest, {})[place[0], place[1]] = one
    rows, columns = (() if axis is None else axis.values for axis in (row_axis, column_axis))
    return [Sheet(", ".join(rest), rows, columns, images) for rest, images in found.items()]


def draw_sheet(sheet: Sheet, axes: Sequence[Axis]) -> Image.Image:
    """The sheet as an image, with labels above its columns and beside its rows."""
    row_axis, column_axis = sheet_axes(axes)
    sizes = []
    for one in sheet.images.values():
        with Image.open(one.path) as image:
            scale = min(1.0, _SIDE / max(image.size))
            sizes.append([max(1, round(side * scale)) for side in image.size])
    width, height = (max(side) for side in zip(*sizes, strict=True))
    rows, columns = max(1, len(sheet.rows)), max(1, len(sheet.columns))
    beside = min(
        _LABEL, math.ceil(max((length(value.label, TEXT) for value in sheet.rows), default=-2 * _GAP)) + 2 * _GAP
    )
    left = _MARGIN + beside
    inside = columns * (width + _GAP) - _GAP
    named = " by ".join(axis.name for axis in (row_axis, column_axis) if axis is not None)
    heads = [wrap(value.label, width, 2) for value in sheet.columns]
    titles = [(line, _TITLE, _INK) for line in ([named] if named else [])]
    titles += [(line, TEXT, _QUIET) for line in wrap(sheet.title, max(inside, 300), 4)]
    top = _MARGIN + sum(step(size) for _, size, _ in titles) + max(map(len, heads), default=0) * step(TEXT) + _GAP
    paper = (max(left + inside, 300 + _MARGIN) + _MARGIN, top + rows * (height + _GAP) - _GAP + _MARGIN)
    drawn = Image.new("RGB", paper, _PAPER)
    pen, line_top = ImageDraw.Draw(drawn), _MARGIN
    for line, size, colour in titles:
        write(pen, _MARGIN, line_top, line, size, colour)
        line_top += step(size)
    for column, lines in enumerate(heads):
        for number, line in enumerate(lines):
            at = left + column * (width + _GAP) + (width - length(line, TEXT)) / 2
            write(pen, at, top - _GAP - (len(lines) - number) * step(TEXT), line, TEXT, _INK)
    for row, value in enumerate(sheet.rows):
        for number, line in enumerate(wrap(value.label, beside - _GAP, 6)):
            write(pen, _MARGIN, top + row * (height + _GAP) + number * step(TEXT), line, TEXT, _INK)
    for (row, column), one in sheet.images.items():
        with Image.open(one.path) as image:
            image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            drawn.paste(image.convert("RGB"), (left + column * (width + _GAP), top + row * (height + _GAP)))
    return drawn


def write_sheets(folder: Path, axes: Sequence[Axis], shown: Sequence[Shown]) -> list[Path]:
    """Writes every sheet, sheet_1.png and so on, and index.html; returns their paths."""
    sheets, written = sheets_of(axes, shown), []
    for number, sheet in enumerate(sheets, 1):
        path = folder / f"sheet_{number:0{len(str(len(sheets)))}}.png"
        with replacing(path) as unfinished:
            draw_sheet(sheet, axes).save(unfinished, format="PNG")
        written.append(path)
    page = folder / "index.html"
    with replacing(page) as unfinished:
        unfinished.write_text(render_page(sheets, axes), encoding="utf-8")
    return [*written, page]


def render_page(sheets: Sequence[Sheet], axes: Sequence[Axis]) -> str:
    """A page that needs nothing beside it: tables of the images with their settings, to enlarge and to compare."""
    row_axis, column_axis = sheet_axes(axes)
    named = [axis.name for axis in (row_axis, column_axis) if axis is not None]
    data = {
        "heading": " by ".join(named) or "grid",
        "about": ", ".join(f"{axis.name}: {axis.values[0].label}" for axis in axes if len(axis.values) == 1),
        "tables": [_table(sheet, axes, " \\ ".join(named)) for sheet in sheets],
    }
    return render("grid.html", data["heading"], data)


def _table(sheet: Sheet, axes: Sequence[Axis], corner: str) -> dict[str, Any]:
    """A sheet as the page's script wants it."""
    rows, columns = range(max(1, len(sheet.rows))), range(max(1, len(sheet.columns)))
    return {
        "title": sheet.title,
        "corner": corner,
        "rows": [value.label for value in sheet.rows] or [""],
        "columns": [value.label for value in sheet.columns],
        "cells": [[_cell(sheet.images.get((row, column)), axes) for column in columns] for row in rows],
    }


def _cell(shown: Shown | None, axes: Sequence[Axis]) -> dict[str, Any] | None:
    if shown is None:
        return None
    with Image.open(shown.path) as image:
        source = data_url(image, longest=max(image.size), quality=90)
    labels = [f"{name}: {label}" for name, label in shown.cell.labels(axes).items()]
    return {"src": source, "name": shown.path.name, "facts": [*labels, shown.settings, shown.path.name]}
