"""--config_file in and out. Sections only put keys in order: a key means the same in any of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.options.base import Given, OptionGroup, Options, opt, options_of
from library.options.unknown_keys import Elsewhere, is_off, judge
from library.options.values import from_toml, is_blank
from library.runtime.documents import format_toml, read_toml
from library.runtime.durable import replacing
from library.screen import hide


@dataclass(frozen=True, kw_only=True)
class ConfigOptions(OptionGroup, group="config", title="Configuration file"):
    config_file: str | None = opt(
        None, "TOML file with options; the command line takes precedence; .toml may be omitted"
    )
    recipe: str | None = opt(
        None,
        "options for a card and a way to train, by a name in docs/recipes.md or a path; what is given counts more",
    )
    output_config: bool = opt(False, "write all options of this command to the file named by --config_file, and exit")


RECIPE_TABLE = "recipe"  # of a recipe's file, about it; no options
_NOT_IN_FILES = tuple(option.dest for option in options_of(ConfigOptions))


def config_path(name: str) -> Path:
    return Path(name if name.endswith(".toml") else f"{name}.toml")


@dataclass(frozen=True)
class FileOptions:
    """The options of a configuration file for one script."""

    name: str
    given: dict[str, Given]
    wrong: dict[str, tuple[Any, str]]  # option -> value and what is wrong with it, if it has an effect
    remarks: tuple[str, ...]  # one line for each key that is ignored


def read_config(
    name: str, groups: Iterable[type[OptionGroup]], elsewhere: Elsewhere = dict, *, option: str = "--config_file"
) -> FileOptions:
    """The options that a configuration file gives; a key in several sections counts as the last of them says.

    Args: option: that names the file.
    Raises: UserError: no such file, no TOML, or any number of keys that ask for something else than would be trained.
    """
    path = config_path(name)
    known = {option.dest: option for group in groups for option in options_of(group)}
    given: dict[str, Given] = {}
    wrong: dict[str, tuple[Any, str]] = {}
    remarks: list[str] = []
    problems: list[str] = []
    tables = read_toml(path, "the configuration file", option=option)
    pairs: list[tuple[str, Any]] = []
    for key, value in tables.items():
        if key == RECIPE_TABLE and isinstance(value, dict):
            continue
        if isinstance(value, dict) and key in known and known[key].details.secret:
            hide(value)  # a table in place of a text reads as a section, whose keys messages name
        pairs += value.items() if isinstance(value, dict) else [(key, value)]
    for key, value in pairs:
        if key in _NOT_IN_FILES:
            if not is_off(value):
                remarks.append(f"key {key!r} in {path.name}: ignored; it belongs on the command line")
        elif key == "datasets":
            problems.append(f"[[datasets]] in {path.name} describes a data set: give that file with --dataset_config")
        elif key not in known:
            verdict = judge(key, value, known, elsewhere)
            if verdict.kind == "warning":
                remarks.append(f"key {key!r} in {path.name}: {verdict.text}")
        elif not is_blank(known[key], value):
            wrong.pop(key, None)
            before = given.pop(key, None)
            try:
                given[key] = Given(from_toml(known[key], value), path.name)
            except ValueError as error:
                wrong[key] = value, str(error)
            if before is not None and before != given.get(key):
                remarks.append(f"key {key!r} in {path.name}: given in several sections; the last one counts")
    if problems:
        raise UserError(*problems)
    return FileOptions(path.name, given, wrong, tuple(remarks))


def write_config(options: Options) -> Path:
    """Writes every option that has a value, in sections, without secrets; reading the file gives the same options.

    Raises: UserError: --config_file is missing, or names a file that exists or cannot be made.
    """
    if options.config.config_file is None:
        raise UserError("--output_config: needs --config_file to name the file to write")
    path = config_path(options.config.config_file)
    tables = {}
    for group in options.groups:
        values = {
            option.dest: getattr(group, option.dest)
            for option in options_of(type(group))
            if option.dest not in _NOT_IN_FILES and not option.details.secret
        }
        table = {dest: value for dest, value in values.items() if value is not None}
        if table:
            tables[group.group] = table
    try:
        if os.path.lexists(path):
            raise UserError(f"--output_config: {path} exists already; it is never overwritten")
        with replacing(path) as temporary:
            temporary.write_text(format_toml(tables), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output_config: cannot write {path}: {error.strerror}") from None
    return path
