"""flags.json: the ecosystem's flags, one row each, with a column for each script that has it so ("x")."""

from __future__ import annotations

import json
from argparse import Action
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TABLE = json.loads((Path(__file__).parent / "flags.json").read_text(encoding="utf-8"))
SCRIPTS: tuple[str, ...] = tuple(_TABLE["scripts"])
ADDED_CHOICES = {
    "max_token_length": {75},  # means the same as leaving it out
    "dynamo_backend": {"no"},  # what GUIs write
    "show_timesteps": {"off"},  # the same
}


def flags_of(script: str) -> dict[str, dict[str, Any]]:
    """The rows of a script by dest, positional arguments in their order."""
    column = SCRIPTS.index(script)
    return {row["dest"]: row for row in _TABLE["flags"] if row["in"][column] == "x"}


def expected(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple]:
    """What `described` gives where a script has its flags as the rows have them."""
    return {
        dest: (
            () if fact.get("positional") else tuple(fact.get("flags", [f"--{dest}"])),
            fact.get("positional", False) or fact.get("required", False),
            _value(fact["default"]),
            "*" if fact.get("nargs") == "+" else fact.get("nargs"),  # a list without values counts as not given
            fact.get("type", True),
            frozenset(fact.get("choices") or ()) - {None},
        )
        for dest, fact in facts.items()
    }


def described(actions: Mapping[str, Action], added: Mapping[str, set[Any]] = ADDED_CHOICES) -> dict[str, tuple]:
    """By dest: flags, required, default, nargs, the type's name (True: a flag without a value), choices.

    `added`: choices that only ours have, beside those of `ADDED_CHOICES`.
    """
    added = {**ADDED_CHOICES, **added}
    return {
        dest: (
            tuple(action.option_strings),
            action.required,
            _value(action.default),
            action.nargs,
            action.const if action.nargs == 0 else action.type.__name__,
            frozenset(action.choices or ()) - {None} - added.get(dest, set()),
        )
        for dest, action in actions.items()
    }


def _value(value: Any) -> str:
    """1 and True differ; 1 and 1.0 are the same, and so are an empty list and nothing."""
    if value == []:
        value = None
    return repr(float(value)) if type(value) is int else repr(value)
