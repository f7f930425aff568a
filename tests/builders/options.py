"""Real option groups for tests: the defaults of a script or of some groups, but for what a test gives."""

from __future__ import annotations

from typing import Any

from library.options.base import COMMAND_LINE, Given, OptionGroup, Options, build_options, options_of
from library.registry import groups_for


def options_for(family: str, method: str, **values: Any) -> Options:
    """All groups of the script that trains `method` on `family`."""
    return options_with(*groups_for(family, method), **values)


def options_with(*groups: type[OptionGroup], **values: Any) -> Options:
    """These groups; `values` by the options' names, as if given on the command line. A text may stand for a list."""
    options = {option.dest: option for group in groups for option in options_of(group)}
    unknown = values.keys() - options.keys()
    assert not unknown, f"no options of these groups: {unknown}"
    values = {
        name: [value] if options[name].many and isinstance(value, str) else value for name, value in values.items()
    }
    return build_options(groups, {name: Given(value, COMMAND_LINE) for name, value in values.items()})
