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
from library.options.network import LARGEST_RANK, NetworkOptions, find_module, resolved_module
from library.options.words import WordOptions
from library.runtime.logs import LOGGER
from networks.file_names import require_types
from networks.spec import NetworkModule

if TYPE_CHECKING:
    from library.options.base import Options
    from library.types import FamilyTraits

DEFAULT_DIM = 4  # the rank where none is given


def check_options(opts: Options, traits: FamilyTraits | None = None) -> list[str]:
    """One line for each mistake; arguments that have no effect are logged as warnings."""
    options, problems = opts.method, known_words(opts.words.caption_words)
    for path in filter(None, [options.network_weights, *(options.base_weights or [])]):
        try:
            require_weights(path)
            if path in (options.base_weights or []) and file_format(path) == "safetensors":
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
        dim, layout = options.network_dim or DEFAULT_DIM, traits.block_layout if traits else None
        given = {"args": args, "dropout": options.network_dropout, "layout": layout}
        for line in module.check(**given, dim=dim, ranks_from_file=options.dim_from_weights):
            LOGGER.warning("%s", line)
        name = module.parse(**given).layer.reads_gradients()
        if name and opts.optimizer.fused_backward_pass:
            problems.append(
                f"--network_args: {name} looks at the gradients after the backward pass, in which "
                "--fused_backward_pass drops them; leave one of the two out"
            )
    except UserError as error:
        problems += error.problems
    return problems


def declared_module(name: str) -> NetworkModule | None:
    """The declaration of one of our own network modules, which `networks` holds; None for any other's.

    Raises: UserError: it is in `networks`, and is no network module.
    """
    if not name.startswith("networks."):
        return None
    module = importlib.import_module(name)
    if not isinstance(getattr(module, "MODULE", None), NetworkModule):
        raise UserError(f"--network_module: {name} is no kind of network; try networks.lora")
    return module.MODULE


def require_network_module(name: str | None) -> None:
    """Raises: UserError: there is no such module."""
    if not name or not find_module(resolved_module(name)):
        raise UserError(f"--network_module: there is no module named {name!r}; networks.lora trains LoRA")


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
    groups=(NetworkOptions, WordOptions),
    method=EntryPoint("library.methods.network:NetworkMethod"),
    check=check_options,
)
