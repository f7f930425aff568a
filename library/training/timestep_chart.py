"""Charts over timesteps: panels with curves, as an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from library.data.report.text_drawing import length, write

# Drawn larger and made smaller at the end, which smooths the lines. All in pixels of the finished figure.
_DETAIL = 3
_PANEL = (560, 330)  # of the plot itself
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 34, 58, 62  # around each plot
_TITLE, _LETTERS, _LINE = 17, 13, 22
_PAPER, _INK, _QUIET, _GRID = "#ffffff", "#1c1c1c", "#5f5f5b", "#e3e3df"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00")  # distinguishable by the colour-blind, too


@dataclass(frozen=True)
class Curve:
    name: str
    points: list[tuple[float, float]]  # (timestep, value)


@dataclass(frozen=True)
class Panel:
    title: str
    axis: str  # what the values are
    top: float  # of the vertical axis
    ticks: Sequence[float]
    curves: list[Curve]
    across: str = "timestep (1000 sigma)"


def figure(parts: Sequence[Panel], columns: int = 2, notes: Sequence[str] = ()) -> Image.Image:
    """The panels in rows, and lines of text below them."""
    width, height = _LEFT + _PANEL[0] + _RIGHT, _TOP + _PANEL[1] + _BOTTOM
    rows, below = -(-len(parts) // columns), _LINE * len(notes)
    image = Image.new("RGB", (columns * width * _DETAIL, (rows * height + below) * _DETAIL), _PAPER)
    pen = ImageDraw.Draw(image)
    for number, panel in enumerate(parts):
        _draw(pen, panel, number % columns * width, number // columns * height)
    for number, note in enumerate(notes):
        _write(pen, _LEFT, rows * height + _LINE * number - 6, note, _LETTERS, _QUIET)
    return image.resize((columns * width, rows * height + below), Image.Resampling.LANCZOS)


def _draw(pen: ImageDraw.ImageDraw, panel: Panel, left: int, top: int) -> None:
    plot_left, plot_top = left + _LEFT, top + _TOP
    bottom = plot_top + _PANEL[1]

    def place(timestep: float, value: float) -> tuple[float, float]:
        across = plot_left + timestep / 1000 * _PANEL[0]
        return across, bottom - value / panel.top * _PANEL[1]

    _write(pen, plot_left, top + 12, panel.title, _TITLE, _INK)
    _write(pen, plot_left, top + 36, panel.axis, _LETTERS, _QUIET)
    for value in panel.ticks:
        _line(pen, [place(0, value), place(1000, value)], _GRID, 1)
        text = f"{value:g}"
        _write(pen, plot_left - 10 - _width(text), place(0, value)[1] - 9, text, _LETTERS, _QUIET)
    for timestep in range(0, 1001, 200):
        across = place(timestep, 0)[0]
        _line(pen, [(across, plot_top), (across, bottom + 5)], _GRID, 1)
        text = str(timestep)
        _write(pen, across - _width(text) / 2, bottom + 8, text, _LETTERS, _QUIET)
    _line(pen, [place(0, 0), place(1000, 0)], _QUIET, 1)
    for text, across in (
        ("image", plot_left),
        (panel.across, plot_left + (_PANEL[0] - _width(panel.across)) / 2),
        ("noise", plot_left + _PANEL[0] - _width("noise")),
    ):
        _write(pen, across, bottom + 28, text, _LETTERS, _QUIET)
    for number, curve in enumerate(panel.curves):
        colour = _COLOURS[number]
        shown = [place(*point) for point in curve.points if point[1] <= panel.top]  # what is higher leaves the plot
        _line(pen, shown, colour, 2.4)
    _legend(pen, panel, plot_left + 14, plot_top + 8)


def _legend(pen: ImageDraw.ImageDraw, panel: Panel, left: float, top: float) -> None:
    if max(curve.points[0][1] for curve in panel.curves) > 0.8 * panel.top:  # one is at the upper left
        left += _PANEL[0] - 72 - max(_width(curve.name) for curve in panel.curves)
    for number, curve in enumerate(panel.curves):
        line = top + 20 * number
        box = (left - 6, line, left + 36 + _width(curve.name), line + 20)
        pen.rectangle([side * _DETAIL for side in box], fill=_PAPER)
        _line(pen, [(left, line + 10), (left + 24, line + 10)], _COLOURS[number], 3)
        _write(pen, left + 32, line + 1, curve.name, _LETTERS, _INK)


def _line(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
    pen.line([(x * _DETAIL, y * _DETAIL) for x, y in points], fill=colour, width=round(width * _DETAIL), joint="curve")


def _write(pen: ImageDraw.ImageDraw, left: float, top: float, text: str, size: int, colour: str) -> None:
    write(pen, left * _DETAIL, round(top * _DETAIL), text, size * _DETAIL, colour)


def _width(text: str) -> float:
    return length(text, _LETTERS * _DETAIL) / _DETAIL
