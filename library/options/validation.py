"""Everything that can be wrong with the options alone, all at once, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from library.options.base import Option, Options, options_of
from library.runtime.files import path_problem

if TYPE_CHECKING:
    from library.families.base import FamilyTraits


def problems(options: Options, traits: FamilyTraits) -> list[str]:
    """One line per problem, e.g. "--network_dim: must be at least 1, got 0 (from run.toml)"; empty if all is well."""
    lines: list[str] = []
    outside = {}  # values that no check of several options may calculate with
    for group in options.groups:
        for option in options_of(type(group)):
            value = getattr(group, option.dest)
            lines += [f"{option.flag}: {problem}" for problem in _of_value(option, value)]
            if option.range_problem(value):
                outside[option.dest] = option.default
    sound = options.replaced(**outside) if outside else options
    for group in sound.groups:
        lines += group.check(sound, traits)
    return [_with_origin(line, options) for line in dict.fromkeys(lines)]


def warnings(options: Options, traits: FamilyTraits) -> list[str]:
    """One line per option that is followed, or harmlessly not followed, but was perhaps not meant."""
    lines = []
    for group in options.groups:
        for option in options_of(type(group)):
            if option.dest not in options.given:
                continue
            value = options.given[option.dest].value
            if option.details.deprecated and value != option.default:
                lines.append(f"{option.flag}: an older way to say {option.details.deprecated}")
            if option.details.lenient and option.range_problem(value):
                lines.append(f"{option.flag}: {option.range_problem(value)}; ignored")
        lines += group.advise(options, traits)
    return [_with_origin(line, options) for line in lines]


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


def _with_origin(line: str, options: Options) -> str:
    """Adds the configuration file's name where the option that a line is about came from one."""
    named = re.match(r"--(\w+)", line)
    origin = options.origin(named[1]) if named else "default"
    return line if origin in ("default", "command line") else f"{line} (from {origin})"
