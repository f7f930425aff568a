"""--config_file in and out. Sections only put keys in order: a key means the same in any of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.options.base import Given, OptionGroup, Options, opt, options_of
from library.options.nearest import did_you_mean
from library.options.values import from_toml
from library.runtime.durable import replacing


@dataclass(frozen=True, kw_only=True)
class ConfigOptions(OptionGroup, group="config", title="Configuration file"):
    config_file: str | None = opt(
        None, "TOML file with options; flags on the command line win over it, and .toml may be left out"
    )
    output_config: bool = opt(False, "write all options of this command to the file named by --config_file, and stop")


_NOT_IN_FILES = tuple(option.dest for option in options_of(ConfigOptions))


def config_path(name: str) -> Path:
    return Path(name if name.endswith(".toml") else f"{name}.toml")


def read_config(name: str, groups: Iterable[type[OptionGroup]]) -> dict[str, Given]:
    """The options that a configuration file gives.

    Raises: UserError: no such file, no TOML, or any number of unknown keys and wrong values, all at once.
    """
    path = config_path(name)
    known = {option.dest: option for group in groups for option in options_of(group)}
    given: dict[str, Given] = {}
    problems = []
    for key, value in _keys(_load(path)):
        if key in _NOT_IN_FILES:
            problems.append(f"key {key!r} in {path.name} belongs on the command line; remove it from the file")
        elif key == "datasets":
            problems.append(f"[[datasets]] in {path.name} describes a data set: give that file with --dataset_config")
        elif key not in known:
            problems.append(f"unknown key {key!r} in {path.name}{did_you_mean(key, known)}")
        elif key in given:
            problems.append(f"key {key!r} in {path.name}: given twice, in different sections")
        else:
            try:
                given[key] = Given(from_toml(known[key], value), path.name)
            except ValueError as error:
                problems.append(f"key {key!r} in {path.name}: {error}")
    if problems:
        raise UserError(*problems)
    return given


def write_config(options: Options) -> Path:
    """Writes every option that has a value, in sections, without secrets; reading the file gives the same options.

    Raises: UserError: --config_file is missing, or names a file that exists or cannot be made.
    """
    if options.config.config_file is None:
        raise UserError("--output_config: needs --config_file to name the file to write")
    path = config_path(options.config.config_file)
    lines = []
    for group in options.groups:
        values = {
            option.dest: getattr(group, option.dest)
            for option in options_of(type(group))
            if option.dest not in _NOT_IN_FILES and not option.details.secret
        }
        rows = [f"{dest} = {_toml(value)}" for dest, value in values.items() if value is not None]
        lines += [f"[{group.group}]", *rows, ""] if rows else []
    try:
        if os.path.lexists(path):
            raise UserError(f"--output_config: {path} exists already; it is never overwritten")
        with replacing(path) as temporary:
            temporary.write_text("\n".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output_config: cannot write {path}: {error.strerror}") from None
    return path


def _load(path: Path) -> dict[str, Any]:
    import toml

    try:
        return toml.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"--config_file: {path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"--config_file: cannot read {path}: {error.strerror}") from None
    except (ValueError, IndexError, TypeError) as error:  # what the toml package raises for broken files
        raise UserError(f"--config_file: {path} is not valid TOML: {error}") from None


def _keys(tables: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, dict):
            yield from value.items()
        else:
            yield key, value


def _toml(value: Any) -> str:
    """JSON writes text, numbers, booleans and lists as TOML does, but for one control character."""
    text = str(value) if isinstance(value, Path) else value
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
