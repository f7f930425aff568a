"""--grid: the product of settings, as contact sheets and as a page to look at."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.inference.prompts import FLOW_SAMPLERS, SAMPLERS, finish
from library.options.nearest import did_you_mean
from library.runtime.documents import read_text

if TYPE_CHECKING:
    from library.generation.requests import Request, Requests
    from library.inference.prompt_lines import Changes
    from library.options.base import Options
    from library.types import FamilyTraits

WEIGHTS, STRENGTH, PROMPT = "network_weights", "network_mul", "prompt"
KINDS = {"seed": int, "scale": float, "steps": int, "sampler": str}  # of axes that are fields of a prompt
AXES = (WEIGHTS, STRENGTH, *KINDS, PROMPT)


@dataclass(frozen=True)
class Value:
    """A place on an axis."""

    label: str
    value: Any


@dataclass(frozen=True)
class Axis:
    name: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Cell:
    """One image: a value for each axis, in their order."""

    values: tuple[Value, ...]

    def of(self, axes: Sequence[Axis], name: str) -> Value | None:
        return next((value for axis, value in zip(axes, self.values, strict=True) if axis.name == name), None)

    def labels(self, axes: Sequence[Axis]) -> dict[str, str]:
        return {axis.name: value.label for axis, value in zip(axes, self.values, strict=True)}

    def changes(self, axes: Sequence[Axis], fixed: Sequence[float]) -> Changes:
        """What the axes say of a prompt. Args: fixed: strengths of networks that are on no axis."""
        found: Changes = {
            axis.name: value.value for axis, value in zip(axes, self.values, strict=True) if axis.name in KINDS
        }
        strength, weights = self.of(axes, STRENGTH), self.of(axes, WEIGHTS)
        if strength is not None:
            found["multipliers"] = (*(fixed if weights else ()), strength.value)
        return found


def axes_of(entries: Sequence[str]) -> list[Axis]:
    """``name=value,value`` each. Raises: UserError: every problem at once."""
    axes, problems = [], []
    for entry in entries:
        name, equals, text = entry.partition("=")
        name = name.strip()
        if not equals or name not in AXES:
            near = did_you_mean(name, AXES)
            problems.append(f"--grid: {entry!r} is no axis{near}; give name=value,value, with {', '.join(AXES)}")
        elif any(axis.name == name for axis in axes):
            problems.append(f"--grid: {name} is given twice")
        else:
            try:
                axes.append(Axis(name, tuple(_values(name, text))))
            except (UserError, ValueError) as error:
                problems.append(f"--grid: {name}: {error}")
    if problems:
        raise UserError(*problems)
    return axes


def cells_of(axes: Sequence[Axis]) -> list[Cell]:
    """The product of the axes; the last one changes first."""
    return [Cell(values) for values in product(*(axis.values for axis in axes))]


def grid_requests(
    requests: Requests, axes: Sequence[Axis], cells: Sequence[Cell], opts: Options, traits: FamilyTraits
) -> list[Request]:
    """The request of every cell. Raises: UserError: a prompt that stands for several, or a value that cannot be."""
    prompts = next((axis.values for axis in axes if axis.name == PROMPT), (Value("", opts.prompts.prompt),))
    found = requests.of([(f"--prompt {value.value!r}", value.value) for value in prompts])
    if len(found) > len(prompts):
        raise UserError("--grid: a prompt with {e$$...} stands for several; give them as an axis, prompt=FILE")
    by_prompt = {value.value: request for value, request in zip(prompts, found, strict=False)}
    fixed = opts.networks.multipliers()
    made = []
    for cell in cells:
        own = cell.of(axes, PROMPT)
        request = by_prompt.get(opts.prompts.prompt if own is None else own.value)
        if request is not None:  # else it has failed, which stops the run
            prompt = finish(request.prompt, cell.changes(axes, fixed), traits, "--grid", FLOW_SAMPLERS)
            made.append(replace(request, prompt=prompt))
    return made


def sheet_axes(axes: Sequence[Axis]) -> tuple[Axis | None, Axis | None]:
    """The axes of rows and columns: the first two with several values. Each combination of others has its own sheet."""
    several = [axis for axis in axes if len(axis.values) > 1]
    rows, columns = (*several[:2], None, None)[:2]
    return (None, rows) if columns is None else (rows, columns)


def _values(name: str, text: str) -> Iterator[Value]:
    if name == PROMPT:
        prompts = [text]
        if os.path.isfile(text):
            lines = (line.strip() for line in read_text(Path(text), "the prompts").splitlines())
            prompts = [line for line in lines if line and not line.startswith("#")]
            if not prompts:
                raise ValueError(f"{text} holds no prompt")
        yield from (Value(prompt, prompt) for prompt in prompts)
        return
    for part in filter(None, (part.strip() for part in text.split(","))):
        if name == WEIGHTS:
            found = sorted(glob.glob(os.path.expanduser(part)), key=_natural)
            if not found:
                raise ValueError(f"there is no file {part!r}")
            yield from (Value(Path(path).stem, path) for path in found)
        elif name == STRENGTH:
            yield Value(part, _number(part, float))
        else:
            yield Value(part, _number(part, KINDS[name]))
    if not text.strip(", "):
        raise ValueError("has no value")


def _number(text: str, kind: Any) -> Any:
    if kind is str:
        if text not in SAMPLERS:
            raise ValueError(f"unknown sampler {text!r}{did_you_mean(text, SAMPLERS)}")
        return text
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{text!r} is no {'whole ' if kind is int else ''}number") from None


def _natural(path: str) -> list[tuple[int, str]]:
    """Numbers in names count as numbers: step 900 stands before step 1000."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]
