"""The options of all families in one group, for scripts that take a model of any family. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import field, make_dataclass
from typing import Any, get_type_hints

from library.families.registry import FAMILIES
from library.options.base import OptionGroup, opt, options_of

Member = tuple[str, Any, Any]  # of a dataclass: name, annotation, field


def switches() -> Iterator[Member]:
    """A switch for every family but the first, which is meant where an option names none."""
    for name in list(FAMILIES)[1:]:
        yield name, bool, opt(False, f"the model is {FAMILIES[name].traits.label}")


def options_of_families(only: Collection[str] | None = None) -> Iterator[Member]:
    """Every option of the families' own groups once, or `only` those of these names.

    Of options of one name the first family's is shown, without a default where families have several.
    """
    merged: dict[str, tuple[Any, Any]] = {}
    for spec in FAMILIES.values():
        hints = get_type_hints(spec.options)
        for option in options_of(spec.options):
            if only is not None and option.dest not in only:
                continue
            found = spec.options.__dataclass_fields__[option.dest]
            hint, shown = merged.setdefault(option.dest, (hints[option.dest], found))
            if shown.default != found.default:
                # one without a default explains what counts instead
                explained = found if found.default is None else shown
                merged[option.dest] = hint | None, field(default=None, metadata=explained.metadata)
    for name, (hint, found) in merged.items():
        yield name, hint, field(default=found.default, metadata=found.metadata)  # a field belongs to one class only


def group_with(base: type[OptionGroup], members: Iterator[Member], name: str, module: str) -> type[OptionGroup]:
    """A group like `base` with further options. Args: name, module: where it can be found."""
    return make_dataclass(
        name, list(members), bases=(base,), frozen=True, kw_only=True, namespace={"__module__": module}
    )
