"""--recipe: the options of a file in recipes/, which name a card and a way to train, below all that a user gives."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.options.base import Given, OptionGroup
from library.options.config_file import RECIPE_TABLE, FileOptions, read_config
from library.options.unknown_keys import Elsewhere
from library.runtime.documents import read_toml

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
_OPTION = "--recipe"
_NAMED = 4  # recipes in a message
_LIKENESS = 0.5  # of a name that is suggested, from 0 to 1

# The scripts whose recipes are taken, and what such a recipe says of other options of the script that takes it.
Scripts = Mapping[str, Mapping[str, Any]]

# Arguments of what a user has replaced would be given to what replaces it.
_ARGUMENTS_OF = {
    "optimizer_args": ("optimizer_type", "use_8bit_adam", "use_lion_optimizer"),
    "network_args": ("network_module",),
    "lr_scheduler_args": ("lr_scheduler", "lr_scheduler_type"),
}


@dataclass(frozen=True)
class About:
    """The table [recipe] of a file."""

    script: str | None  # that it is for, without .py; None: any that takes --recipe
    card: int | None  # GB of the memory that it is made for


def names() -> list[str]:
    """The names of the recipes that come with the program."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def about(path: Path) -> About:
    """The table [recipe] of a file. Raises: UserError: the file cannot be read, or the table is wrong."""
    table = read_toml(path, "the recipe", option=_OPTION).get(RECIPE_TABLE, {})
    found = table if isinstance(table, dict) else {"": table}
    script, card = found.get("script"), found.get("card")
    is_number = isinstance(card, int) and not isinstance(card, bool)
    if found.keys() - {"script", "card"} or not isinstance(script, str | None) or not (card is None or is_number):
        raise UserError(f"{_OPTION}: {path}: [{RECIPE_TABLE}] takes script, a name, and card, a whole number of GB")
    return About(script and script.removesuffix(".py"), card)


def read_recipe(
    name: str, groups: Sequence[type[OptionGroup]], scripts: Scripts, above: Mapping[str, Given], elsewhere: Elsewhere
) -> FileOptions:
    """The options that a recipe gives, without the arguments of what options above it replace.

    Args:
        name: of a file in recipes/ without .toml; or a path, which ends with .toml or has a slash.
        scripts: whose recipes are taken.
        above: the options that count before the recipe's.
    Raises: UserError: no such recipe, one of another script, or what `read_config` raises.
    """
    is_path = name.endswith(".toml") or "/" in name or "\\" in name
    path = Path(name if name.endswith(".toml") else f"{name}.toml") if is_path else FOLDER / f"{name}.toml"
    if not is_path and name not in names():
        raise UserError(f"{_OPTION} {name}: there is no such recipe; {_choice(name, scripts)}")
    script = about(path).script
    if script is not None and script not in scripts:
        raise UserError(f"{_OPTION} {name}: is a recipe of {script}.py; run that script, or {_choice(name, scripts)}")
    file = read_config(str(path), groups, elsewhere, option=_OPTION)
    given = dict(file.given)
    for dest, value in scripts.get(script or "", {}).items():
        if dest in above and above[dest].value != value:
            raise UserError(f"--{dest}: cannot be used with {_OPTION} {name}, which is a recipe of {script}.py")
        given[dest] = Given(value, file.name)
    for arguments, owners in _ARGUMENTS_OF.items():
        if any(owner in above and above[owner].value != given.get(owner, Given(None, "")).value for owner in owners):
            given.pop(arguments, None)
    return replace(file, given=given)


def _choice(name: str, scripts: Scripts) -> str:
    """The recipes of the script that are nearest to a name, in words."""
    own = [one for one in names() if about(FOLDER / f"{one}.toml").script in scripts]
    near = difflib.get_close_matches(name, own, n=_NAMED, cutoff=_LIKENESS) or own[:_NAMED]
    return f"for this one there are {', '.join(near)}" if near else "this one has none; give a path, or --config_file"
