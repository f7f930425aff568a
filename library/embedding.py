"""Training from Python, as programs do it that import the scripts: options travel as an `argparse.Namespace`.

parser = train_network.setup_parser()
args = train_util.read_config_from_file(parser.parse_args(), parser)
train_network.NetworkTrainer().train(args)
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from library import cli, registry
from library.errors import UserError
from library.options import parsing
from library.options.base import COMMAND_LINE, Given, build_options, options_of
from library.options.values import from_text, from_toml, is_blank
from library.runtime.logs import LOGGER


def train(args: Namespace, *, family: str, method: str) -> None:
    """Does what the script of `family` and `method` does, and ends the process where that would.

    Args:
        args: options by name. One that is missing, None or equal to its default counts as not given; attributes that
            are no options of the script are ignored. --config_file is not read here, see `read_config_from_file`.
    """
    with cli.ending_as_a_script():
        groups = registry.groups_for(family, method)
        given, problems = {}, []
        for option in (option for group in groups for option in options_of(group)):
            value = getattr(args, option.dest, None)
            if value is None or value == option.default or is_blank(option, value):
                continue
            # It comes from a parser, a configuration file or a program.
            if isinstance(value, list | tuple):
                value = [str(item) if isinstance(item, Path) else item for item in value]
            elif isinstance(value, Path):
                value = str(value)
            is_text = isinstance(value, str) and option.kind != "bool" and not option.many
            try:
                value = from_text(option, value) if is_text else from_toml(option, value)
                given[option.dest] = Given(value, COMMAND_LINE)
            except ValueError as error:
                problems.append(f"{option.flag}: {error}")
        if problems:
            raise UserError(*problems)
        options = build_options(groups, given)
    cli.run(family, method, options=options)


class Trainer:
    """Base of the trainer classes of the scripts: `Trainer().train(args)`."""

    script: ClassVar[Mapping[str, str]]  # "family" and "method"

    def train(self, args: Namespace) -> None:
        train(args, **self.script)


def read_config_from_file(args: Namespace, parser: ArgumentParser) -> Namespace:
    """A copy of `args`, filled from what --config_file and --recipe name. With --output_config that is written instead.

    The command line wins over the files, and so does what `args` has changed from the default.

    Args:
        parser: from a script's `setup_parser`.
    """
    config, recipe = getattr(args, "config_file", None), getattr(args, "recipe", None)
    if not config and not recipe:
        return args
    with cli.ending_as_a_script():
        if args.output_config:
            parsing.parse_options(parser)  # writes the file and exits
        changed = {dest: value for dest, value in vars(args).items() if value != parser.get_default(dest)}
        flags = {dest: Given(value, COMMAND_LINE) for dest, value in changed.items()}
        options = parsing.with_files(
            parser.groups, config or None, recipe or None, flags, registry.options_elsewhere, parser.scripts
        )
        for line in options.remarks:
            LOGGER.warning("%s", line)
        filled = Namespace(**vars(args))
        for dest in options.given.keys() - changed.keys():
            setattr(filled, dest, options.given[dest].value)
        # Once more, for flags that repeat a default: argparse keeps what the namespace has already.
        return parser.without_blanks(parser.parse_known_args(namespace=filled)[0])


def add_missing_options(parser: ArgumentParser, family: str, group: str) -> None:
    """Gives a parser those options of a family's group that it lacks."""
    known = {flag for action in parser._actions for flag in action.option_strings}
    wanted = {
        option.flag
        for options in registry.groups_for(family, "network")
        if options.group == group
        for option in options_of(options)
    }
    for action in cli.build_parser(family, "network")._actions:
        if wanted.intersection(action.option_strings) and not known.intersection(action.option_strings):
            parser._add_action(action)
