"""Everything that can be wrong with the options alone, all at once, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from library.options.base import COMMAND_LINE, Option, Options, options_of
from library.options.unknown_keys import is_gui_default, is_off
from library.runtime.files import path_problem

if TYPE_CHECKING:
    from library.types import FamilyTraits


def problems(options: Options, traits: FamilyTraits) -> list[str]:
    """One line per problem, e.g. "--network_dim: must be at least 1, got 0 (from run.toml)"; empty if all is well."""
    lines: list[str] = []
    outside = {}  # values that no check of several options may calculate with
    for group in options.groups:
        for option in filter(options.has_effect, options_of(type(group))):
            value = getattr(group, option.dest)
            lines += [f"{option.flag}: {problem}" for problem in _of_value(option, value)]
            if option.range_problem(value):
                outside[option.dest] = option.default
    sound = options.replaced(**outside) if outside else options
    for group in sound.groups:
        lines += group.check(sound, traits)
    return [_with_origin(line, options) for line in dict.fromkeys(lines)]


def warnings(options: Options, traits: FamilyTraits) -> list[str]:
    """One line per option that is followed, or harmlessly not followed, but was perhaps not meant.

    Nothing is said of what a GUI writes into every configuration file, wanted or not.
    """
    lines = []
    for group in options.groups:
        for option in options_of(type(group)):
            if option.dest in options.given:
                lines += [f"{option.flag}: {line}" for line in _warnings_of(option, options)]
        lines += group.warnings(options, traits)
    wanted = [line for line in dict.fromkeys(lines) if not _is_of_a_gui(line, options)]
    return [*options.remarks, *(_with_origin(line, options) for line in wanted)]


def _of_value(option: Option, value: Any) -> Iterator[str]:
    if value == option.default:
        return
    problem = option.range_problem(value)
    if problem:
        yield problem
    wanted = option.details.exists
    fault = path_problem(value, wanted) if wanted else None
    if fault:
        yield f"there is no {wanted} {str(value)!r}" if fault == f"no such {wanted}" else f"{str(value)!r}: {fault}"


def _warnings_of(option: Option, options: Options) -> Iterator[str]:
    value = options.given[option.dest].value
    if option.details.deprecated and value != option.default and not is_off(value):
        yield f"deprecated; use {option.details.deprecated}"
    if option.details.lenient and option.range_problem(value) and not is_off(value):
        yield f"{option.range_problem(value)}; ignored"
    if value != option.default and not is_off(value) and not options.has_effect(option):
        yield f"has no effect without {option.required}"


def _is_of_a_gui(line: str, options: Options) -> bool:
    name = _option_of(line)
    given = options.given.get(name)
    return given is not None and given.source != COMMAND_LINE and is_gui_default(name, given.value)


def _option_of(line: str) -> str:
    """The name of the option that a line is about; empty where it is about none."""
    named = re.match(r"--(\w+)", line)
    return named[1] if named else ""


def _with_origin(line: str, options: Options) -> str:
    """Adds the configuration file's name where the option that a line is about came from one."""
    origin = options.origin(_option_of(line))
    return line if origin in ("default", COMMAND_LINE) else f"{line} (from {origin})"
