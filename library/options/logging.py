"""Messages on the console, and curves of the run."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal

from library.errors import UserError
from library.options.base import COMMAND_LINE, OptionGroup, Options, opt, options_of
from library.options.nearest import did_you_mean
from library.runtime.documents import read_toml
from library.runtime.durable import LONGEST_NAME, fitting
from library.runtime.files import path_problem
from library.runtime.packages import remedy
from library.screen import hide

if TYPE_CHECKING:
    from library.types import FamilyTraits

# What a table of --log_tracker_config may set; for wandb it is what the installed wandb.init takes.
TENSORBOARD_KEYS = ("comment", "filename_suffix", "flush_secs", "max_queue", "purge_step")
_LEAST_OF_A_NAME = 20  # bytes that are left for it, or it is left out
_SECRETS_IN_ENVIRONMENT = {"wandb_api_key": "WANDB_API_KEY", "huggingface_token": "HF_TOKEN"}


@dataclass(frozen=True, kw_only=True)
class ConsoleOptions(OptionGroup, group="console", title="Messages"):
    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = opt(
        None, "lowest level of messages that are shown; INFO if not given"
    )
    console_log_file: str | None = opt(None, "write messages to this file instead of the console")
    console_log_simple: bool = opt(False, "plain messages without time and level, for consoles such as Colab's")


@dataclass(frozen=True, kw_only=True)
class LoggingOptions(ConsoleOptions, group="logging", title="Messages and logs"):
    logging_dir: str | None = opt(
        None, "folder for logs; TensorBoard's have one sub-folder per run, by date, time and --output_name"
    )
    log_with: Literal["tensorboard", "wandb", "all"] | None = opt(
        None, "where losses and rates are logged; all means both; tensorboard if only --logging_dir is given"
    )
    log_prefix: str | None = opt(None, "prefix of the name of the run's log folder, before the date and time")
    log_tracker_name: str | None = opt(
        None, "name of the tracker inside the log folder, and of the project at Weights & Biases"
    )
    log_config: bool = opt(False, "log the options, without API keys, folders and absolute paths")
    log_tracker_config: str | None = opt(
        None, "TOML file with a table of settings per tracker, [tensorboard] and [wandb]", exists="file"
    )
    wandb_run_name: str | None = opt(None, "name of the run at Weights & Biases; --output_name if not given")
    wandb_api_key: str | None = opt(
        None, "key for Weights & Biases; best given in WANDB_API_KEY or a --config_file", secret=True
    )
    notify: str | None = opt(
        None,
        "URL to which a message goes when the run is done, was stopped or has failed, such as ntfy://topic or "
        "mailto://..., or several with blanks between; see apprise. Best given in a --config_file",
        secret=True,
    )
    no_results_page: bool = opt(False, "write no <output_name>.html, which shows the run in a browser")

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers to log to: any of "tensorboard" and "wandb"."""
        if self.log_with is None:
            return ("tensorboard",) if self.logging_dir else ()
        return ("tensorboard", "wandb") if self.log_with == "all" else (self.log_with,)

    def folder_of_run(self, moment: str, name: str | None) -> Path:
        """The folder of TensorBoard's logs for a run that began at `moment`, a date and time of 14 digits.

        Args: name: --output_name, by which a run is known among others; as much of it as there is room for.
        """
        path = Path(self.logging_dir or "", f"{self.log_prefix or ''}{moment}")
        room = LONGEST_NAME - len(os.fsencode(path.name))
        if not name or room < _LEAST_OF_A_NAME:
            return path
        return path.with_name(path.name + fitting(f"-{Path(name).name}", "", room))

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if "tensorboard" in self.trackers and not self.logging_dir:
            yield f"--log_with: {self.log_with} needs --logging_dir, the folder to write to"
        if "wandb" in self.trackers and not _is_installed("wandb"):
            yield f"--log_with: {self.log_with} needs the package wandb, which is not installed; {remedy('wandb')}"
        elif self.log_tracker_config and path_problem(self.log_tracker_config, "file") is None:
            try:
                read_tracker_config(self.log_tracker_config, self.trackers)
            except UserError as error:
                yield from error.problems
        yield from _notify_problems(notify_urls(opts))

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if "tensorboard" not in self.trackers and self.log_prefix:
            yield "--log_prefix: has no effect without --logging_dir and TensorBoard's logs in it"
        for name in ("log_tracker_name", "log_config", "log_tracker_config") if not self.trackers else ():
            if getattr(self, name):
                yield f"--{name}: has no effect without --logging_dir or --log_with wandb"
        for name in ("wandb_run_name", "wandb_api_key") if "wandb" not in self.trackers else ():
            if getattr(self, name):
                yield f"--{name}: has no effect without --log_with wandb or all"
        for name in secrets(opts):
            if opts.origin(name) == COMMAND_LINE:
                variable = _SECRETS_IN_ENVIRONMENT.get(name)
                other = f", or set {variable} in the environment" if variable else ""
                stored = ", and Weights & Biases stores command lines" if "wandb" in self.trackers else ""
                yield (
                    f"--{name}: others can see it on the command line (process list, shell history{stored}); "
                    f"put it into a --config_file{other}"
                )


def read_tracker_config(path: str, trackers: Iterable[str] = ("tensorboard", "wandb")) -> dict[str, dict[str, Any]]:
    """The settings of each tracker by its name; those of `trackers` are checked by name.

    Raises: UserError: the file cannot be read or is no TOML, or says something that no tracker understands.
    """
    tables = read_toml(path, "the settings of trackers", option="--log_tracker_config")
    problems = []
    for name, table in tables.items():
        if name not in ("tensorboard", "wandb") or not isinstance(table, dict):
            problems.append(f"--log_tracker_config: {name!r} in {path} is no tracker; use [tensorboard] and [wandb]")
        elif name in trackers:
            known = TENSORBOARD_KEYS
            if name == "wandb":
                import wandb

                known = tuple(inspect.signature(wandb.init).parameters)
            problems += [
                f"--log_tracker_config: unknown key {key!r} in [{name}] of {path}{did_you_mean(key, known)}"
                for key in table
                if key not in known
            ]
    if problems:
        raise UserError(*problems)
    return tables


def absolute_paths(opts: Options) -> list[str]:
    """One line if the command line, which Weights & Biases stores, holds absolute paths."""
    if "wandb" not in opts.logging.trackers:
        return []
    values = opts.flat()
    given = [name for name in opts.given if opts.origin(name) == COMMAND_LINE and holds_absolute_path(values[name])]
    if not given:
        return []
    flags = ", ".join(f"--{name}" for name in sorted(given))
    return [f"{flags}: absolute paths, which Weights & Biases stores with the command line; relative ones reveal less"]


def holds_absolute_path(value: Any) -> bool:
    """Whether an option's value is an absolute path of any system, or a list or name=value with one."""
    if isinstance(value, list):
        return any(map(holds_absolute_path, value))
    if not isinstance(value, str | Path):
        return False
    parts = [str(value), *re.split(r"[=,]", str(value))]
    return any(
        PurePosixPath(part).is_absolute() or PureWindowsPath(part).is_absolute() or part.startswith("~")
        for part in parts
    )


def secrets(opts: Options) -> dict[str, str]:
    """The options that hold a key or token, with their values."""
    found = (option.dest for group in opts.groups for option in options_of(type(group)) if option.details.secret)
    values = opts.flat()
    return {name: values[name] for name in found if values[name]}


def notify_urls(opts: Options) -> list[str]:
    """The URLs of --notify."""
    return (opts.logging.notify or "").split()


def _notify_problems(urls: list[str]) -> Iterable[str]:
    """One line for each URL that cannot be used; none shows it, as URLs hold keys."""
    if urls and not _is_installed("apprise"):
        yield f"--notify: needs the package apprise, which is not installed; {remedy('apprise')}"
        return
    hide(urls)
    for number, url in enumerate(urls, 1):
        import apprise

        logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)  # it says why, and shows the URL
        if not apprise.Apprise().add(url):
            kind = re.match(r"[a-z0-9]{2,12}(?=://)", url)
            yield (
                f"--notify: URL {number}{f', {kind[0]}://...' if kind else ''} is none that apprise can use; "
                "check its service and its parts"
            )


def _is_installed(package: str) -> bool:
    """Not so a folder of that name in the working folder, such as wandb makes for its logs."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None
