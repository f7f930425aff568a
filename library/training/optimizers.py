"""Optimizers by the names that command lines use."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from library.errors import UserError

if TYPE_CHECKING:
    import torch

    from library.options.optimizer import OptimizerOptions


def literal_args(option: str, entries: Sequence[str] | None) -> dict[str, Any]:
    """``["weight_decay=0.1", "betas=0.9,0.99"]`` to a dict; values are Python literals.

    Raises: UserError: an entry without "=", or a value that is no literal.
    """
    values: dict[str, Any] = {}
    for entry in entries or ():
        name, equals, text = entry.partition("=")
        try:
            if not equals:
                raise ValueError
            values[name.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError) as error:
            raise UserError(
                f"{option}: {entry!r} is not name=value with a Python literal as its value, e.g. weight_decay=0.01"
            ) from error
    return values


def optimizer_name(options: OptimizerOptions) -> str:
    if options.use_8bit_adam:
        return "AdamW8bit"
    if options.use_lion_optimizer:
        return "Lion"
    return options.optimizer_type or "AdamW"


def _optimizer_class(name: str) -> tuple[type, dict[str, Any]]:
    """The class, and the arguments it gets where the user says nothing."""
    import torch

    match name.lower():
        case "adamw":
            return torch.optim.AdamW, {"fused": True}  # one kernel per step on CUDA, one pass over memory on CPU
        case "adamw8bit":
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit, {}
        case "sgdnesterov":
            return torch.optim.SGD, {"nesterov": True, "momentum": 0.9}
    found = getattr(torch.optim, name, None)
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
        return found, {}
    raise UserError(f"--optimizer_type: unknown optimizer {name!r}; names of torch.optim are case-sensitive")


def make_optimizer(groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
    """The optimizer over `groups` ({"params", "lr", "name"}).

    Raises: UserError: unknown optimizer, or arguments that it does not take.
    """
    name = optimizer_name(options)
    cls, defaults = _optimizer_class(name)
    arguments = {**defaults, **literal_args("--optimizer_args", options.optimizer_args)}
    try:
        return cls(groups, lr=options.learning_rate, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer_args: {name} refuses {arguments}: {error}") from error


def describe_optimizer(optimizer: torch.optim.Optimizer, options: OptimizerOptions) -> str:
    """The text of ss_optimizer: the qualified class, then the arguments the user gave."""
    arguments = literal_args("--optimizer_args", options.optimizer_args)
    cls = type(optimizer)
    text = f"{cls.__module__}.{cls.__name__}"
    return text + (f"({','.join(f'{k}={v}' for k, v in arguments.items())})" if arguments else "")
