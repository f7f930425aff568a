"""Training of a network beside the model, as a method: its spec, and what is checked before torch is imported."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.reading import file_format, read_header, require_weights
from library.entry_points import EntryPoint
from library.errors import UserError
from library.methods.spec import MethodSpec
from library.options.network import LARGEST_RANK, NetworkOptions, find_module
from library.runtime.logs import LOGGER
from networks.file_names import require_lora_names

if TYPE_CHECKING:
    from library.options.base import Options
    from library.types import FamilyTraits

DEFAULT_DIM = 4  # the rank where none is given


def check_options(opts: Options, traits: FamilyTraits | None = None) -> list[str]:
    """One line for each thing to mend; arguments that have no effect are logged as warnings.

    A network module may have a neighbour `<module>_args` whose `check(args, ranks_from_file=..., dim=...)` knows them,
    and whose `reads_gradients(args)` names one for which gradients must outlive the backward pass.
    """
    options, problems = opts.method, []
    for path in filter(None, [options.network_weights, *(options.base_weights or [])]):
        try:
            require_weights(path)
            if path in (options.base_weights or []) and file_format(path) == "safetensors":
                require_lora_names(Path(path), read_header(path)[1])
        except UserError as error:
            problems += error.problems
    try:
        require_network_module(options.network_module)
        args = split_args(options.network_args)
        if options.network_module.startswith("networks.") and find_module(f"{options.network_module}_args"):
            module = importlib.import_module(f"{options.network_module}_args")
            layout = block_layout(module.check, traits)
            dim = options.network_dim or DEFAULT_DIM
            for line in module.check(args, ranks_from_file=options.dim_from_weights, dim=dim, **layout):
                LOGGER.warning("%s", line)
            reads = getattr(module, "reads_gradients", None)
            name = reads(args) if reads is not None else None
            if name and opts.optimizer.fused_backward_pass:
                problems.append(
                    f"--network_args: {name} looks at the gradients after the backward pass, in which "
                    "--fused_backward_pass drops them; leave one of the two out"
                )
        elif not options.network_module.startswith("networks."):
            problems += _endless_rank(args.get("conv_dim", ""))
    except UserError as error:
        problems += error.problems
    return problems


def _endless_rank(text: str) -> Iterator[str]:
    """A rank of convolutions that no memory holds; all else a module of other people judges by itself."""
    if re.fullmatch(r"\d+", text) and (len(text) > 9 or int(text) > LARGEST_RANK):
        yield f"--network_args: conv_dim={text}: must be at most {LARGEST_RANK}"


def block_layout(function: Callable[..., Any], traits: FamilyTraits | None) -> dict[str, Any]:
    """The argument `layout` for a function of a network module, where it takes one and the family has blocks."""
    if traits is None or traits.block_layout is None or "layout" not in inspect.signature(function).parameters:
        return {}
    return {"layout": traits.block_layout}


def require_network_module(name: str | None) -> None:
    """Raises: UserError: there is no such module."""
    if not name or not find_module(name):
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
    groups=(NetworkOptions,),
    method=EntryPoint("library.methods.network:NetworkMethod"),
    check=check_options,
)
