"""Options of the tools as their command lines give them, without a process."""

from __future__ import annotations

from library.model_tools.commands import groups_of
from library.options.base import Options
from library.options.parsing import parse_options


def options(script: str, *arguments: object) -> Options:
    """`script`: its name, without .py."""
    return parse_options(groups_of(script), list(map(str, arguments)), prog=script)
