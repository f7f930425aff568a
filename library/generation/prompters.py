"""Prompt lines that are not known when a script starts: those that a person types, and those of a module."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from library.errors import UserError

if TYPE_CHECKING:
    from library.generation.model import Model
    from library.options.base import Options


def interactive_lines(question: str = "prompt: ") -> Iterator[str]:
    """Lines that are typed, until the input ends; blank ones are left out. Terminals with readline have a history."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() edits lines with it
    while True:
        try:
            line = input(question if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def lines_of_module(opts: Options, model: Model) -> Iterator[tuple[int, str]]:
    """(number, prompt line) of those of --from_module, as long as it gives some.

    It has ``get_prompter(args, pipe, networks)``, which returns lines, or a function that does.

    Raises: UserError: the module cannot be used.
    """
    name = opts.prompts.from_module
    networks = [one.attached for one in model.networks.networks]
    try:
        if name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(name).stem, name)
            assert spec is not None
            assert spec.loader is not None
            module: Any = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(name)
        prompter = module.get_prompter(SimpleNamespace(**opts.flat()), model, networks)
        lines: Iterable[Any] = prompter() if callable(prompter) else prompter
        for number, line in enumerate(lines, 1):
            if not isinstance(line, str):
                raise UserError(f"--from_module: {name}: prompt {number} is no text but {type(line).__name__}")
            yield number, line
    except UserError:
        raise
    except Exception as error:  # another's code may raise anything
        raise UserError(f"--from_module: {name} cannot be used: {type(error).__name__}: {error}") from error
