"""The contact sheets and the page of --grid."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from library.data.report.text_drawing import TEXT, length, step, wrap, write
from library.generation.grid import Axis, Cell, sheet_axes
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
    """A page that needs nothing beside it: tables of the images, with their settings on hover, and zoom on a click."""
    row_axis, column_axis = sheet_axes(axes)
    corner = " \\ ".join(axis.name for axis in (row_axis, column_axis) if axis is not None)
    parts = []
    for sheet in sheets:
        heads = "".join(f"<th>{html.escape(value.label)}</th>" for value in sheet.columns)
        lines = [f"<tr><th>{html.escape(corner)}</th>{heads}</tr>"] if sheet.columns else []
        for row in range(max(1, len(sheet.rows))):
            label = html.escape(sheet.rows[row].label) if sheet.rows else ""
            cells = []
            for column in range(max(1, len(sheet.columns))):
                one = sheet.images.get((row, column))
                if one is None:
                    cells.append("<td></td>")
                    continue
                with Image.open(one.path) as image:
                    buffer = io.BytesIO()
                    image.convert("RGB").save(buffer, format="WEBP", quality=90)
                data = base64.b64encode(buffer.getvalue()).decode("ascii")
                labels = [f"{name}: {label}" for name, label in one.cell.labels(axes).items()]
                facts = html.escape(json.dumps([*labels, one.settings, one.path.name]), quote=True)
                shown = f'src="data:image/webp;base64,{data}" alt="{html.escape(one.path.name)}"'
                cells.append(f'<td><img {shown} data-facts="{facts}"></td>')
            lines.append(f"<tr><th>{label}</th>{''.join(cells)}</tr>")
        title = f"<h2>{html.escape(sheet.title)}</h2>" if sheet.title else ""
        parts.append(f"{title}<table>{''.join(lines)}</table>")
    return _PAGE.replace("@SHEETS@", "\n".join(parts))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>grid</title><style>
:root { color-scheme: light dark; --size: 256px; }
body { font: 14px/1.4 system-ui, sans-serif; margin: 0 1rem 6rem; }
header { position: sticky; top: 0; background: Canvas; padding: .6rem 0; display: flex; gap: 1rem; }
h2 { font-size: 1rem; font-weight: 600; margin: 1rem 0 .4rem; }
table { border-spacing: 6px; }
th { font-weight: 600; text-align: left; vertical-align: top; max-width: 14rem; overflow-wrap: anywhere; }
td img { width: var(--size); display: block; cursor: zoom-in; border-radius: 3px; }
td img:hover { outline: 2px solid Highlight; }
#facts { position: fixed; bottom: 0; left: 0; right: 0; padding: .5rem 1rem; background: Canvas; margin: 0;
  border-top: 1px solid GrayText; min-height: 2.8em; white-space: pre-wrap; }
dialog { border: 0; padding: 0; background: none; max-width: 100vw; max-height: 100vh; }
dialog::backdrop { background: rgba(0, 0, 0, .85); }
dialog img { max-width: 96vw; max-height: 88vh; min-height: 60vh; object-fit: contain; image-rendering: auto; }
dialog p { color: white; margin: .3rem; text-align: center; white-space: pre-wrap; }
</style></head><body>
<header><label>size <input id="size" type="range" min="64" max="1024" value="256"></label>
<span>click: zoom; arrow keys: next and previous; Esc: back</span></header>
@SHEETS@
<p id="facts">Point at an image to see its settings.</p>
<dialog id="zoom"><img alt=""><p></p></dialog>
<script>
const images = [...document.querySelectorAll("td img")], facts = document.getElementById("facts");
const zoom = document.getElementById("zoom"), large = zoom.querySelector("img"), words = zoom.querySelector("p");
let at = 0;
const said = image => JSON.parse(image.dataset.facts).join("\\n");
const show = place => {
  at = (place + images.length) % images.length;
  large.src = images[at].src; words.textContent = said(images[at]);
  if (!zoom.open) zoom.showModal();
};
images.forEach((image, place) => {
  image.title = said(image);
  image.addEventListener("mouseenter", () => { facts.textContent = said(image).replaceAll("\\n", "   "); });
  image.addEventListener("click", () => show(place));
});
zoom.addEventListener("click", () => zoom.close());
document.addEventListener("keydown", event => {
  if (!zoom.open) return;
  if (event.key === "ArrowRight") show(at + 1);
  if (event.key === "ArrowLeft") show(at - 1);
});
document.getElementById("size").addEventListener("input", event =>
  document.documentElement.style.setProperty("--size", event.target.value + "px"));
</script></body></html>
"""
