"""The report of tools/verify_lora.py as texts, as JSON and as an image."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.families.registry import FAMILIES
from library.model_tools.output import require_output
from library.model_tools.verification import Block, Report, verify
from library.options.base import Options
from library.options.logging import ConsoleOptions
from library.options.model_files import VerifyOptions
from library.preparation.common.summary import show
from library.runtime.durable import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

GROUPS = (VerifyOptions, ConsoleOptions)
_ENCODERS = {"clip_l": "te1", "clip_g": "te2", "t5xxl": "te3"}  # options, and the text encoders that they give
_BAR = 24  # signs of the longest bar on the screen

# Of the image, in pixels.
_WIDTH, _ROW, _TOP, _EDGE, _LABEL, _VALUE = 900, 20, 76, 24, 210, 90
_TITLE, _LETTERS = 18, 13
_PAPER, _INK, _QUIET, _GRID = "#ffffff", "#1c1c1c", "#5f5f5b", "#e3e3df"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # distinguishable by the colour-blind, too


def verify_file(opts: Options) -> None:
    """Prints what is found of `network`, and exits: 0 usable, 1 usable with warnings, 2 not usable.

    Raises: UserError: a model that cannot be used, or a result that cannot be written. SystemExit: with 1 or 2.
    """
    chosen = opts.verify
    inputs = [name for name in (chosen.network, chosen.model) if name]
    for flag, ending in (("plot", ".png"), ("json", ".json")):
        if getattr(chosen, flag) is not None:
            require_output(f"--{flag}", getattr(chosen, flag), inputs, [ending])
    encoders = {part: file for option, part in _ENCODERS.items() if (file := getattr(chosen, option))}
    report = verify(chosen.network, chosen.model, encoders)
    for line in text_lines(report, layers=chosen.show_layers):
        show(line)
    if chosen.json is not None:
        _write(chosen.json, json.dumps(as_json(report), indent=2).encode())
    if chosen.plot is not None and report.layers:
        stream = BytesIO()
        drawn(report).save(stream, format="PNG")
        _write(chosen.plot, stream.getvalue())
    if report.status:
        raise SystemExit(report.status)


# --- texts ------------------------------------------------------------------------------------------------------------


def text_lines(report: Report, *, layers: bool = False) -> Iterator[str]:
    """The report for the screen. `layers`: with a line for each layer."""
    yield str(report.path)
    facts = {
        "type": _counted(layer.type for layer in report.layers),
        "layout": report.layout or "mixed or not known",
        "model": FAMILIES[report.family].traits.label if report.family else "not known",
    }
    for part in _parts(report):
        own = [layer for layer in report.layers if layer.part == part]
        ranks = _counted(layer.rank for layer in own if layer.rank is not None) or "-"
        alphas = _counted(f"{layer.alpha:g}" for layer in own if layer.alpha is not None)
        facts[part] = f"{len(own)} layers, rank {ranks}, alpha {alphas or 'none, which means the rank'}"
    if report.layers:
        for name, text in facts.items():
            yield f"  {name:<8} {text}"
        where = report.model or ("models of this kind" if report.family else None)
        if where:
            yield f"  matched  {report.in_file - len(report.unmatched)} of {report.in_file} layers in {where}"
        for program, (read, reasons) in report.programs.items():
            counts = [f"{count} it {reason}" for reason, count in reasons.items()]
            why = ", ".join(counts if len(counts) > 1 else [f"it {reason}" for reason in reasons])
            shown = f"{read or 'none'} of {len(report.layers)} layers: {why}" if why else f"all {read} layers"
            yield f"  {program:<14} reads {shown}"
        yield from _table(report.blocks())
    for layer in report.layers if layers else ():
        change = "-" if layer.change is None else f"{layer.change:.3g}"
        share = "" if layer.relative is None else f" ({layer.relative:.3g} of the weight)"
        yield f"  {layer.name}: {layer.type}, rank {layer.rank or '-'}, change {change}{share}"
    yield from (f"not usable: {problem}" for problem in report.errors)
    yield from (f"warning: {problem}" for problem in report.warnings)
    yield ("usable", "usable, with warnings", "not usable")[report.status]


def _parts(report: Report) -> list[str]:
    return list(dict.fromkeys(layer.part for layer in report.layers))


def _counted(values: Iterable[Any]) -> str:
    """ "16", or "16 (72 layers), 8 (10 layers)" where values differ."""
    counts = Counter(values).most_common()
    return str(counts[0][0]) if len(counts) == 1 else ", ".join(f"{value} ({count} layers)" for value, count in counts)


def _table(blocks: list[Block]) -> Iterator[str]:
    relative = any(block.relative is not None for block in blocks)
    values = [_value(block, relative) for block in blocks]
    largest = max((value for value in values if value is not None), default=0)
    yield f"  {'part':<6} {'block':<28} {'layers':>6}  {measure(relative)}"
    for block, value in zip(blocks, values, strict=True):
        bar = "#" * round(_BAR * value / largest) if value and largest else ""
        shown = "depends on the model's weights" if value is None else f"{value:9.3g}  {bar}"
        yield f"  {block.part:<6} {block.name:<28} {block.layers:>6}  {shown}".rstrip()


def measure(relative: bool) -> str:
    """What is shown of each block."""
    return "|change| / |weight|" if relative else "|change|"


def _value(block: Block, relative: bool) -> float | None:
    return block.relative if relative else block.change


# --- JSON -------------------------------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """All findings, for programs."""
    programs = {name: {"read": read, "not_read": dict(reasons)} for name, (read, reasons) in report.programs.items()}
    return {
        "file": str(report.path),
        "status": report.status,
        "usable": not report.errors,
        "errors": report.errors,
        "warnings": report.warnings,
        "layout": report.layout,
        "family": report.family,
        "types": dict(Counter(layer.type for layer in report.layers)),
        "model": report.model,
        "layers_in_file": report.in_file,
        "unmatched": report.unmatched,
        "programs": programs,
        "blocks": [{**asdict(block), "relative": block.relative} for block in report.blocks()],
        "layers": [{**asdict(layer), "relative": layer.relative} for layer in report.layers],
    }


# --- the image --------------------------------------------------------------------------------------------------------


def drawn(report: Report) -> Image:
    """A bar for each block, coloured by part."""
    from PIL import Image, ImageDraw

    from library.data.report.text_drawing import length, shorten, write

    blocks = report.blocks()
    relative = any(block.relative is not None for block in blocks)
    values = [_value(block, relative) for block in blocks]
    largest = max((value for value in values if value is not None), default=0) or 1
    image = Image.new("RGB", (_WIDTH, _TOP + _ROW * len(blocks) + _EDGE), _PAPER)
    pen = ImageDraw.Draw(image)
    write(pen, _EDGE, 16, shorten(report.path.name, _WIDTH - 2 * _EDGE), _TITLE, _INK)
    write(pen, _EDGE, 44, f"{measure(relative)} by block", _LETTERS, _QUIET)
    colours = dict(zip(_parts(report), _COLOURS * 2, strict=False))
    left, room = _EDGE + _LABEL, _WIDTH - 2 * _EDGE - _LABEL - _VALUE
    place = _WIDTH - _EDGE
    for part, colour in reversed(colours.items()):
        place -= round(length(part, _LETTERS)) + 28
        pen.rectangle((place, 48, place + 11, 59), fill=colour)
        write(pen, place + 17, 44, part, _LETTERS, _INK)
    pen.line((left, _TOP - 4, left, _TOP + _ROW * len(blocks)), fill=_GRID)
    for row, (block, value) in enumerate(zip(blocks, values, strict=True)):
        top = _TOP + row * _ROW
        write(pen, left - 8 - length(block.name, _LETTERS), top, block.name, _LETTERS, _INK)
        width = 0 if value is None else round(room * value / largest)
        pen.rectangle((left, top + 3, left + width, top + _ROW - 4), fill=colours[block.part])
        shown = "not known" if value is None else f"{value:.3g}"
        write(pen, left + width + 8, top, shown, _LETTERS, _QUIET)
    return image


def _write(path: str, content: bytes) -> None:
    try:
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
