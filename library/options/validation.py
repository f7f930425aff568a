"""Everything that can be wrong with the options alone, all at once, before anything is loaded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from library.options.base import COMMAND_LINE, Options, options_of
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
            problem = option.range_problem(value)
            if problem:
                outside[option.dest] = option.default
            if value == option.default:
                continue
            if problem:
                lines.append(f"{option.flag}: {problem}")
            wanted = option.details.exists
            fault = path_problem(value, wanted) if wanted else None
            if fault:
                shown = repr(str(value))
                missing = fault == f"no such {wanted}"
                lines.append(f"{option.flag}: " + (f"there is no {wanted} {shown}" if missing else f"{shown}: {fault}"))
    sound = options.replaced(**outside) if outside else options
    for group in sound.groups:
        lines += group.check(sound, traits)
    return [_with_origin(line, options) for line in dict.fromkeys(lines)]


def warnings(options: Options, traits: FamilyTraits) -> list[str]:
    """One line per option that is followed, or harmlessly not followed, but was perhaps not meant.

    Nothing is said of what a GUI writes into every configuration file, wanted or not.
    """
    lines: list[str] = []
    for group in options.groups:
        for option in options_of(type(group)):
            if option.dest not in options.given or is_off(options.given[option.dest].value):
                continue
            value = options.given[option.dest].value
            if option.details.deprecated and value != option.default:
                lines.append(f"{option.flag}: deprecated; use {option.details.deprecated}")
            if option.details.lenient and option.range_problem(value):
                lines.append(f"{option.flag}: {option.range_problem(value)}; ignored")
            if value != option.default and not options.has_effect(option):
                lines.append(f"{option.flag}: has no effect without {option.required}")
        lines += group.warnings(options, traits)
    found = list(options.remarks)
    for line in dict.fromkeys(lines):
        name = option_of(line)
        given = options.given.get(name)
        if given is None or given.source == COMMAND_LINE or not is_gui_default(name, given.value):
            found.append(_with_origin(line, options))
    return found


def option_of(line: str) -> str:
    """The name of the option that a line is about; empty where it is about none."""
    named = re.match(r"--(\w+)", line)
    return named[1] if named else ""


def _with_origin(line: str, options: Options) -> str:
    """Adds the configuration file's name where the option that a line is about came from one."""
    origin = options.origin(option_of(line))
    return line if origin in ("default", COMMAND_LINE) else f"{line} (from {origin})"
