"""Training of a network beside the model, as a method: its spec, and what is checked before torch is imported."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.reading import file_format, read_header, require_weights
from library.entry_points import EntryPoint
from library.errors import UserError
from library.methods.embedding_spec import known_words
from library.methods.spec import MethodSpec
from library.options.network import LARGEST_RANK, NetworkOptions, find_module, resolved_module, what_to_do
from library.options.words import WordOptions
from library.runtime.logs import LOGGER
from networks.file_names import require_types
from networks.hypernetwork_files import is_hypernetwork_file
from networks.spec import DeclaredModule

if TYPE_CHECKING:
    from library.options.base import Options
    from library.types import FamilyTraits


def check_options(opts: Options, traits: FamilyTraits | None = None) -> list[str]:
    """One line for each mistake; arguments that have no effect are logged as warnings."""
    options, problems = opts.method, known_words(opts.words.caption_words)
    for path in filter(None, [options.network_weights, *(options.base_weights or [])]):
        try:
            require_weights(path)
        except UserError as error:
            problems += error.problems
    for path in options.base_weights or [] if not problems else []:
        if is_hypernetwork_file(path):
            problems.append(
                f"--base_weights: {path}: this is a hypernetwork, which changes the inputs of layers and cannot be "
                "merged into their weights; --network_module=networks.hypernetwork continues from it with "
                "--network_weights"
            )
        elif file_format(path) == "safetensors":
            try:
                require_types(Path(path), read_header(path)[1])
            except UserError as error:
                problems += error.problems
    try:
        require_network_module(options.network_module)
        args, module = split_args(options.network_args), declared_module(resolved_module(options.network_module))
        if module is None:
            rank = args.get("conv_dim", "")  # all else a module of others judges by itself
            if re.fullmatch(r"\d+", rank) and (len(rank) > 9 or int(rank) > LARGEST_RANK):
                problems.append(f"--network_args: conv_dim={rank}: must be at most {LARGEST_RANK}")
            return problems
        for line in module.check_run(opts, args, traits):
            LOGGER.warning("%s", line)
    except UserError as error:
        problems += [problem for problem in error.problems if problem not in problems]
    return problems


def with_file_format(opts: Options) -> Options:
    """The options with the --save_model_as that --network_module has, where it has one only."""
    try:
        module = declared_module(resolved_module(opts.method.network_module or ""))
    except (UserError, ImportError):
        return opts  # the checks say what is wrong
    asked = opts.saving.save_model_as
    if module is None or module.save_as in (None, asked):
        return opts
    if "save_model_as" in opts.explicit:
        LOGGER.warning("--save_model_as: has no effect: %s saves .%s files only", module.name, module.save_as)
    return opts.replaced(save_model_as=module.save_as)


def declared_module(name: str) -> DeclaredModule | None:
    """The declaration of one of our own network modules, which `networks` holds; None for any other's.

    Raises: UserError: it is in `networks`, and is no network module. ImportError: there is none.
    """
    if not name.startswith("networks."):
        return None
    module = importlib.import_module(name)
    if not isinstance(getattr(module, "MODULE", None), DeclaredModule):
        raise UserError(f"--network_module: {name} is no kind of network; try networks.lora")
    return module.MODULE


def require_network_module(name: str | None) -> None:
    """Raises: UserError: there is no such module."""
    if not name:
        raise UserError("--network_module: missing; networks.lora trains a LoRA")
    if not find_module(resolved_module(name)):
        raise UserError(f"--network_module: there is no module named {name!r}{what_to_do(name)}")


def split_args(entries: list[str] | None) -> dict[str, str]:
    """``["conv_dim=4", ...]`` to a dict, split at the first "="; of a name given twice the last value counts.

    Raises: UserError: an entry without "=".
    """
    args: dict[str, str] = {}
    for entry in entries or []:
        name, equals, value = entry.partition("=")
        name = name.strip()
        if not equals or not name:
            raise UserError(f"--network_args: {entry!r} is not name=value, e.g. conv_dim=4")
        args[name] = value.strip()
    return args


NETWORK = MethodSpec(
    name="network",
    title="Trains a LoRA-type network on {model}.",
    tracker="network_train",
    usage="--network_weights={file}",
    groups=(NetworkOptions, WordOptions),
    method=EntryPoint("library.methods.network:NetworkMethod"),
    check=check_options,
    complete_options=with_file_format,
)
