"""Command line, configuration file and recipe to `Options`: flag > file > recipe > default."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NoReturn

from library.errors import UserError
from library.options import large_models, method  # noqa: F401 - they declare groups that all options have
from library.options.base import COMMAND_LINE, Given, Option, OptionGroup, Options, build_options, options_of
from library.options.config_file import read_config, write_config
from library.options.recipes import Scripts, read_recipe
from library.options.unknown_keys import Elsewhere, is_off, judge_flag
from library.options.values import from_text, is_blank
from library.screen import HIDDEN, shown

_ABSENT: Any = object()


_HELP = "show this help, or only what a word names, in titles of groups or in flags, as in --help optimizer"
_METAVARS = {"int": "N", "float": "X", "int_or_float": "N", "Path": "PATH", "str": "TEXT"}


_Format = partial(argparse.HelpFormatter, max_help_position=28)  # columns; the fewest lines at 80


class _Help(argparse.Action):
    """Prints the help, whole or of some groups, and ends with status 0."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> NoReturn:
        print(parser.help_on(values) if values else parser.format_help(), end="")
        parser.exit()


class OptionParser(argparse.ArgumentParser):
    """argparse, with mistakes raised as UserError instead of a usage dump, and blank values taken as not given.

    Other programs call `parse_args`, which ends with status 2 as argparse's own does.
    """

    groups: tuple[type[OptionGroup], ...] = ()
    scripts: Scripts = MappingProxyType({})  # whose recipes are taken

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        try:
            return self.without_blanks(super().parse_args(args, namespace))
        except UserError as error:
            self.exit(2, f"{error.render()}\n")

    def without_blanks(self, namespace: argparse.Namespace) -> argparse.Namespace:
        """The namespace with blank values replaced by the defaults."""
        values = vars(namespace)
        defaults = {dest: self.get_default(dest) for dest in values}
        return argparse.Namespace(**{**defaults, **dict(_not_blank(values))})

    def help_on(self, word: str) -> str:
        """The help of the groups that have `word` in their title, and of the options that have it in their flag.

        Raises: UserError: there are none.
        """
        wanted = word.strip("-").replace("-", "_").lower()
        formatter = self._get_formatter()
        for group in self._action_groups:
            actions, title = group._group_actions, (group.title or "").lower()
            if wanted.replace("_", " ") not in title.replace("-", " "):
                actions = [one for one in actions if any(wanted in flag for flag in one.option_strings)]
            if actions:
                formatter.start_section(group.title)
                formatter.add_arguments(actions)
                formatter.end_section()
        text = formatter.format_help()
        if not text:
            raise UserError(f"--help {word}: no group of options and no flag has this word in its name")
        return text

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if value is not _ABSENT:
            super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def build_parser(groups: Iterable[type[OptionGroup]], prog: str | None = None, description: str = "") -> OptionParser:
    """A parser with every option of `groups`; flags may be abbreviated as long as they stay unique."""
    groups = tuple(groups)
    usage = " ".join(["%(prog)s [options]", *_positional(groups)])
    parser = OptionParser(prog=prog, usage=usage, description=description, add_help=False, formatter_class=_Format)
    parser.add_argument("-h", "--help", nargs="?", action=_Help, metavar="GROUP", help=_HELP)
    parser.groups = groups
    for group in parser.groups:
        section = parser.add_argument_group(group.title)
        for option in options_of(group):
            details = option.details
            if details.positional:
                section.add_argument(option.dest, help=_help(option), type=_converter(option))
                continue
            shown: dict[str, Any] = {"default": option.default, "help": _help(option), "required": details.required}
            if option.kind == "bool":
                shown["action"] = "store_true"
            else:
                shown["type"] = _converter(option)
                shown["metavar"] = _metavar(option)
                if option.choices:
                    shown["choices"] = (*option.choices, None) if option.optional else option.choices
                    shown["metavar"] = "{" + ",".join(map(str, option.choices)) + "}"
                if option.many:
                    shown["nargs"] = details.values or "*"
            section.add_argument(*filter(None, [details.short]), option.flag, dest=option.dest, **shown)
    return parser


def parse_options(
    parser: OptionParser | Iterable[type[OptionGroup]],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str = "",
    elsewhere: Elsewhere = dict,
    scripts: Scripts | None = None,
) -> Options:
    """Reads the command line and the files of --config_file and --recipe. Values are not checked against each other.

    With --output_config it writes the first of these files instead and exits with status 0, as --help does.

    Args:
        elsewhere: gives the options of other scripts, for what is said about those that this one does not have.
        scripts: whose recipes are taken; those of the parser if not given.

    Raises: UserError: unknown or ambiguous flags, values of the wrong type, a bad configuration file.
    """
    if not isinstance(parser, OptionParser):
        parser = build_parser(parser, prog, description)
    # argparse leaves alone what a namespace already has: what is still _ABSENT afterwards was not given
    blank = argparse.Namespace(**{option.dest: _ABSENT for g in parser.groups for option in options_of(g)})
    words = sys.argv[1:] if argv is None else list(argv)
    values, unknown = parser.parse_known_args(words, blank)
    if unknown:
        raise UserError(*_unknown_problems(parser, words, unknown, elsewhere))
    flags = {dest: Given(value, COMMAND_LINE) for dest, value in _not_blank(vars(values))}
    writing = "output_config" in flags
    options = with_files(
        parser.groups,
        None if writing or "config_file" not in flags else flags["config_file"].value,
        flags["recipe"].value if "recipe" in flags else None,
        flags,
        elsewhere,
        parser.scripts if scripts is None else scripts,
    )
    if writing:
        print(shown(f"wrote {write_config(options)}"))
        raise SystemExit(0)
    return options


def with_files(
    groups: Sequence[type[OptionGroup]],
    config: str | None,
    recipe: str | None,
    flags: Mapping[str, Given],
    elsewhere: Elsewhere,
    scripts: Scripts,
) -> Options:
    """The options of a configuration file, of a recipe and of the command line, which wins over both.

    Raises: UserError: a value of a file that is wrong, of an option that has an effect; or a file cannot be read.
    """
    files = [] if config is None else [read_config(config, groups, elsewhere)]
    if recipe is not None:
        above = {**(files[0].given if files else {}), **flags}
        files.append(read_recipe(recipe, groups, scripts, above, elsewhere))
    all_options = [option for group in groups for option in options_of(group)]
    given = dict(flags)
    for file in files:  # the higher one first
        given = _above(given, file.given, all_options)
    options = build_options(groups, given)
    remarks, problems, higher = [], [], set(flags)
    for file in files:
        remarks += file.remarks
        for option in all_options:
            value, why = file.wrong.get(option.dest, (None, ""))
            if not why or option.dest in higher:
                continue
            if options.has_effect(option):
                problems.append(f"key {option.dest!r} in {file.name}: {why}")
            elif not is_off(value):
                remarks.append(f"key {option.dest!r} in {file.name}: has no effect without {option.required}")
        higher |= file.given.keys()
    if problems:
        raise UserError(*problems)
    return build_options(groups, given, remarks) if files else options


def _above(higher: Mapping[str, Given], lower: Mapping[str, Given], all_options: Iterable[Option]) -> dict[str, Given]:
    """What is given in either of two places; the lower one has no say where an older or newer spelling is above."""
    kept = dict(lower)
    for option in all_options:
        target = option.details.alias_of
        if target and option.dest in higher:
            kept.pop(target, None)
        if target and target in higher:
            kept.pop(option.dest, None)
    return {**kept, **higher}


def _not_blank(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for dest, value in values.items():
        items = [item for item in value if item is not _ABSENT] if isinstance(value, list) else value
        if items is not _ABSENT and (items or not value):
            yield dest, items


def _unknown_problems(
    parser: OptionParser, words: Sequence[str], unknown: Sequence[str], elsewhere: Elsewhere
) -> list[str]:
    known = {option.dest: option for g in parser.groups for option in options_of(g) if not option.details.positional}
    flags = [text.split("=", 1)[0] for text in unknown if text.startswith("-") and text != "--"]
    if not flags:
        lists = {option.flag for group in parser.groups for option in options_of(group) if option.many}
        for before, after in pairwise(words):
            flag, equals, _ = before.partition("=")
            if equals and flag in lists and after == unknown[0]:  # argparse takes no further values then
                return [f"{flag}: takes several values without an equals sign only, as in {flag} A B"]
        alone = _positional(parser.groups)
        rule = f"beside {' and '.join(alone)} " if alone else ""
        # Long mixtures of letters and digits are keys more than words.
        key = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w+=-]{20,}", re.ASCII)
        stray = " ".join(HIDDEN if key.fullmatch(word) else word for word in unknown)
        return [f"unexpected value {stray!r}: {rule}every value needs its option before it"]
    return [f"unknown option {flag}{judge_flag(flag, known, elsewhere)}" for flag in flags]


def _positional(groups: Iterable[type[OptionGroup]]) -> list[str]:
    return [option.dest for group in groups for option in options_of(group) if option.details.positional]


def _metavar(option: Option) -> str:
    """What stands for a value in the help; the option's own name, as argparse has it, would break nearly every line."""
    if option.details.exists or option.dest.endswith("_dir"):
        return (option.details.exists or "folder").upper()
    return _METAVARS[option.kind]


def _converter(option: Option) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        if is_blank(option, text):
            if option.details.positional or option.details.required:
                raise argparse.ArgumentTypeError("must not be empty")
            return _ABSENT
        try:
            return from_text(option, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    convert.__name__ = option.kind
    return convert


def _help(option: Option) -> str:
    text = option.details.help
    if option.kind != "bool" and option.default not in (None, ""):
        text += f" (default: {option.default})"
    if option.details.required:
        text += " (required)"
    return text.replace("%", "%%")
