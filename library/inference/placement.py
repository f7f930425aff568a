"""Borrowing modules for inference and giving them back as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule has the mode it had."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def on_device(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Moves modules to `device` and, afterwards, back to where their first weight was."""
    with ExitStack() as stack:
        for module in modules:
            home = _first_weight(module).device
            if home != device:
                stack.callback(module.to, home)
                module.to(device)
        yield


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Widens a module's weights to float32 and narrows them again, which loses nothing."""
    import torch

    home = _first_weight(module).dtype
    try:
        module.to(torch.float32)
        yield
    finally:
        module.to(home)


def _first_weight(module: nn.Module) -> Tensor:
    return next(module.parameters())
