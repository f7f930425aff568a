"""--show_timesteps: which timesteps a run would draw and how it would weigh them, as text or as an image."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.report.contact_sheet import show
from library.errors import UserError
from library.objectives.histogram import DRAWS, Bin, histogram
from library.options.base import Option, options_of
from library.runtime.durable import fitting, replacing
from library.runtime.logs import LOGGER
from library.training.timestep_chart import Curve, Panel, figure

if TYPE_CHECKING:
    from library.objectives.objective import Objective
    from library.options.base import Options
    from library.types import FamilyTraits

COLUMNS = 80
_TEXT_BINS, _IMAGE_BINS = 20, 40
_NOTE_LETTERS = 150  # in a line below the charts
# Options that decide times and weights; each family has some of them.
_OF_TIMES = (
    *("timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "training_shift", "weighting_scheme"),
    *("logit_mean", "logit_std", "mode_scale", "model_prediction_type", "min_timestep", "max_timestep"),
    *("v_parameterization", "min_snr_gamma", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"),
    *("debiased_estimation_loss", "show_timesteps_offset"),
)


def show_timesteps(opts: Options, traits: FamilyTraits, objective: Objective) -> None:
    """Prints the histogram of what the objective draws, or writes it to a PNG file.

    Raises: UserError: the file cannot be written.
    """
    height, width = opts.noise.shown_size
    size, offset = (height // traits.latent_stride, width // traits.latent_stride), opts.noise.show_timesteps_offset
    heading = f"{traits.label}, images of {width}x{height}, {DRAWS:,} draws"
    if opts.noise.show_timesteps == "console":
        for line in as_text(histogram(objective, size, _TEXT_BINS, offset), heading, settings(opts)):
            print(line)
        return
    folder = Path(opts.saving.output_dir or ".")
    file = folder / fitting(f"{opts.saving.output_name}_timesteps" if opts.saving.output_name else "timesteps", ".png")
    charts = panels(histogram(objective, size, _IMAGE_BINS, offset), heading, flow=traits.objective == "flow")
    image = figure(charts, notes=_wrapped(settings(opts), _NOTE_LETTERS))
    try:
        with replacing(file) as temporary:
            image.save(temporary, format="png")
    except OSError as error:
        raise UserError(f"{file}: the image cannot be written ({error.strerror or error})") from None
    LOGGER.info("%s; nothing was trained (--show_timesteps)", file)
    show([file])


def settings(opts: Options) -> list[str]:
    """The options that decide, as they would be given."""
    found: dict[str, tuple[Option, object]] = {}
    for group in opts.groups:
        found |= {option.dest: (option, getattr(group, option.dest)) for option in options_of(type(group))}
    return [
        f"--{name}" if value is True else f"--{name} {value}"
        for name, (option, value) in ((name, found[name]) for name in _OF_TIMES if name in found)
        if value not in (None, False) and opts.has_effect(option) and (name != "show_timesteps_offset" or value)
    ]


def as_text(bins: Sequence[Bin], heading: str, given: Sequence[str]) -> list[str]:
    """Lines of at most `COLUMNS` characters: a bar for what is drawn, and one for what it weighs if weights differ."""
    lines = [heading, *_wrapped(given, COLUMNS), ""]
    plain = _all_weigh_the_same(bins)
    columns = "timesteps     drawn"
    rest = COLUMNS - len(columns) - 1
    most = max(one.share for one in bins)
    if plain:
        lines.append(columns)
        lines += [f"{_span(one)}  {_percent(one.share)}  {_bar(one.share, most, rest)}".rstrip() for one in bins]
        weight = next(one.weight for one in bins if one.weight is not None)
        return [*lines, "", f"Every timestep weighs the same in the loss: {weight:g}."]
    width = (rest - len("    weight   of the loss ")) // 2
    most = max(most, *(one.weighed for one in bins))
    lines.append(f"{columns}{'weight':>{width + 13}}  drawn x weight")
    for one in bins:
        weight = "-" if one.weight is None else f"{one.weight:.4g}"
        line = f"{_span(one)}  {_percent(one.share)}  {_bar(one.share, most, width):<{width}} {weight:>9}"
        lines.append(f"{line}  {_percent(one.weighed)}  {_bar(one.weighed, most, width)}".rstrip())
    return [*lines, "", "drawn x weight: the share of the loss's weight, were the loss itself even."]


def panels(bins: Sequence[Bin], heading: str, *, flow: bool) -> list[Panel]:
    """What is drawn, and what it weighs, each as a chart."""
    drawn = _steps("drawn", [(one, one.share * len(bins)) for one in bins])
    curves = [drawn]
    if not _all_weigh_the_same(bins):
        curves.append(_steps("drawn x weight", [(one, one.weighed * len(bins)) for one in bins]))
    weights = _steps("weight", [(one, one.weight) for one in bins if one.weight is not None])
    across = "timestep (1000 sigma)" if flow else "timestep"
    return [
        _panel(heading, "how often, 1 = uniform", curves, across),
        _panel("weight", "mean factor on the loss", [weights], across),
    ]


def _steps(name: str, values: Sequence[tuple[Bin, float]]) -> Curve:
    return Curve(name, [(edge, value) for one, value in values for edge in (one.start, one.end)])


def _panel(title: str, axis: str, curves: list[Curve], across: str) -> Panel:
    """A panel that the curves just fit into."""
    most = max(value for curve in curves for _, value in curve.points)
    step = next(_even_steps(most / 5))
    count = math.floor(most / step) + 1
    return Panel(title, axis, count * step, [number * step for number in range(count + 1)], curves, across)


def _even_steps(least: float) -> Iterator[float]:
    """1, 2, 5, 10, ... and their fractions, from `least` on."""
    power = 10.0 ** math.floor(math.log10(least))
    yield from (factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def _all_weigh_the_same(bins: Sequence[Bin]) -> bool:
    weights = [one.weight for one in bins if one.weight is not None]
    return max(weights) - min(weights) <= 1e-6 * max(weights)


def _wrapped(given: Sequence[str], columns: int) -> list[str]:
    """Lines of options, whose values stay beside them."""
    unbroken = "  ".join(one.replace(" ", "\0") for one in given)
    return [line.replace("\0", " ") for line in textwrap.wrap(unbroken, columns, break_on_hyphens=False)]


def _span(one: Bin) -> str:
    return f"{one.start:4.0f}-{one.end:4.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:5.1f} %"


def _bar(share: float, most: float, width: int) -> str:
    return "#" * round(share / most * width)
