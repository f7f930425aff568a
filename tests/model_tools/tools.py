"""Options of the tools as their command lines give them, without a process."""

from __future__ import annotations

from collections.abc import Sequence

from library.options.base import OptionGroup, Options
from library.options.parsing import parse_options


def options(groups: Sequence[type[OptionGroup]], *arguments: object) -> Options:
    return parse_options(groups, list(map(str, arguments)), prog="tool")
