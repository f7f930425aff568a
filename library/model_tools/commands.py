"""The scripts that merge networks into models and extract them: their options, and what they do. No torch."""

from __future__ import annotations

from library.entry_points import EntryPoint
from library.families.registry import TOOLS
from library.options.base import OptionGroup, Options
from library.options.logging import ConsoleOptions

merge: EntryPoint[[Options], None] = EntryPoint("library.model_tools.network_into_model:merge")
extract: EntryPoint[[Options], None] = EntryPoint("library.model_tools.network_from_models:extract")


def groups_of(script: str) -> tuple[type[OptionGroup], ...]:
    """The option groups of a script, by its name."""
    return (TOOLS[script], ConsoleOptions)
