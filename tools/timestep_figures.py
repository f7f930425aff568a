"""`python tools/timestep_figures.py` draws docs/images/timesteps.png: which timesteps flow models are trained at."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from PIL import Image, ImageDraw

from library import registry
from library.data.report.text_drawing import length, write
from library.objectives.flow import FlowObjective, FlowSettings, loss_weighting, shift_sigma
from library.options.loss import LossOptions, NoiseOptions

FILE = ROOT / "docs" / "images" / "timesteps.png"
DRAWS, BINS, SEED = 2_000_000, 50, 1
LARGE = 1024 // 8  # side of the latents of an image of 1024 pixels

# Drawn larger and made smaller at the end, which smooths the lines. All in pixels of the finished figure.
_DETAIL = 3
_PANEL = (560, 330)  # of the plot itself
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 34, 58, 62  # around each plot
_TITLE, _LETTERS = 17, 13
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


def drawn(name: str, sampling: Any, **settings: Any) -> Curve:
    """The density of timesteps as the objective draws them; 1 is the density of uniform ones."""
    chosen = FlowSettings(sampling, **settings)
    objective = FlowObjective(chosen, NoiseOptions(), LossOptions())
    generator = torch.Generator().manual_seed(SEED)
    timesteps = objective.draw(torch.zeros(DRAWS, 1, 1, 1), generator).timesteps.float()
    edges, whole = torch.linspace(0, 1000, BINS + 1), -0.01  # whole timesteps count to the bin that they begin
    if sampling == "sigma":  # a list of 1000 shifted levels: as many of them in each bin, or there would be false waves
        edges, whole = 1000 * shift_sigma(edges / 1000, chosen.shift), 0.01
    counts = torch.bincount(torch.bucketize(timesteps, edges[1:-1] + whole), minlength=BINS)
    heights = counts / DRAWS * 1000 / edges.diff()
    return Curve(name, list(zip(((edges[1:] + edges[:-1]) / 2).tolist(), heights.tolist(), strict=True)))


def weighed(name: str, scheme: Any) -> Curve:
    times = [1000 * place / 400 for place in range(1, 401)]
    weights = loss_weighting(scheme, torch.tensor(times) / 1000).tolist()
    return Curve(name, list(zip(times, weights, strict=True)))


def shift_by_size(height: int, width: int) -> float:
    """Of the family whose sampling takes another shift at another size."""
    for spec in registry.FAMILIES.values():
        shift = spec.traits.flow_shift
        if shift is not None and shift(64, 64) != shift(128, 128):
            return shift(height, width)
    raise LookupError("no family has a shift that depends on the size")


def panels() -> list[Panel]:
    large, small = shift_by_size(LARGE, LARGE), shift_by_size(LARGE // 2, LARGE // 2)
    density = "how often, 1 = uniform"
    return [
        Panel(
            "--timestep_sampling",
            density,
            3.0,
            (0, 1, 2, 3),
            [
                drawn("sigma (shift 3, uniform scheme)", "sigma", shift=3.0),
                drawn("uniform", "uniform"),
                drawn("sigmoid", "sigmoid"),
                drawn("shift (3)", "shift", shift=3.0),
                drawn("flux_shift (1024 x 1024)", "flux_shift", shift_of=lambda *_: large),
            ],
        ),
        Panel(
            "--sigmoid_scale and the size of images",
            density,
            4.0,
            (0, 1, 2, 3, 4),
            [
                drawn("sigmoid, scale 0.5", "sigmoid", sigmoid_scale=0.5),
                drawn("sigmoid, scale 1", "sigmoid"),
                drawn("sigmoid, scale 2", "sigmoid", sigmoid_scale=2.0),
                drawn("flux_shift (512 x 512)", "flux_shift", shift_of=lambda *_: small),
                drawn("flux_shift (1024 x 1024)", "flux_shift", shift_of=lambda *_: large),
            ],
        ),
        Panel(
            "--weighting_scheme, as a density (shift 1)",
            density,
            4.0,
            (0, 1, 2, 3, 4),
            [
                drawn("uniform, none, sigma_sqrt, cosmap", "discrete"),
                drawn("logit_normal", "discrete", weighting_scheme="logit_normal"),
                drawn("logit_normal, mean 1", "discrete", weighting_scheme="logit_normal", logit_mean=1.0),
                drawn("mode", "discrete", weighting_scheme="mode"),
            ],
        ),
        Panel(
            "--weighting_scheme, as a weight of the loss",
            "factor on the loss",
            8.0,
            (0, 2, 4, 6, 8),
            [
                weighed("sigma_sqrt (up to 1,000,000 at the left)", "sigma_sqrt"),
                weighed("cosmap", "cosmap"),
                weighed("uniform, none, logit_normal, mode", "uniform"),
            ],
        ),
    ]


def figure(parts: Sequence[Panel], columns: int = 2) -> Image.Image:
    """The panels in rows."""
    width, height = _LEFT + _PANEL[0] + _RIGHT, _TOP + _PANEL[1] + _BOTTOM
    rows = -(-len(parts) // columns)
    image = Image.new("RGB", (columns * width * _DETAIL, rows * height * _DETAIL), _PAPER)
    pen = ImageDraw.Draw(image)
    for number, panel in enumerate(parts):
        _draw(pen, panel, number % columns * width, number // columns * height)
    return image.resize((columns * width, rows * height), Image.Resampling.LANCZOS)


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
        ("timestep (1000 sigma)", plot_left + (_PANEL[0] - _width("timestep (1000 sigma)")) / 2),
        ("noise", plot_left + _PANEL[0] - _width("noise")),
    ):
        _write(pen, across, bottom + 28, text, _LETTERS, _QUIET)
    for number, curve in enumerate(panel.curves):
        colour = _COLOURS[number]
        shown = [place(*point) for point in curve.points if point[1] <= panel.top]  # what is higher leaves the plot
        _line(pen, shown, colour, 2.4)
    _legend(pen, panel, plot_left + 14, plot_top + 8)


def _legend(pen: ImageDraw.ImageDraw, panel: Panel, left: float, top: float) -> None:
    if panel.curves[0].points[0][1] > panel.top:  # a curve comes in at the upper left
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


if __name__ == "__main__":
    FILE.parent.mkdir(parents=True, exist_ok=True)
    figure(panels()).quantize(64).save(FILE, optimize=True)
    print(f"wrote {FILE}")
