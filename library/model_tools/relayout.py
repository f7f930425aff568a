"""A weight file's tensors under other names and in other forms, each made when it is written."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from library.checkpoints.writing import Deferred
from library.model_tools.weights import WeightFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.checkpoints.keymap import Entry


def relaid(
    file: WeightFile, entries: Iterable[Entry], dtype: torch.dtype | None, device: torch.device | str = "cpu"
) -> dict[str, Tensor | Deferred]:
    """The tensors that `entries` make of the file's.

    Args:
        entries: `models` of each are names in the file, `file` is the name that is written.
        dtype: of all floating tensors; None: as stored.
        device: where they are converted.
    """
    import torch

    tensors: dict[str, Tensor | Deferred] = {}
    for entry in entries:
        stored = file.dtype(entry.models[0])
        kept = dtype if dtype is not None and stored.is_floating_point else stored
        shape = entry.rule.join([torch.empty(file.shape(name), device="meta") for name in entry.models]).shape
        tensors[entry.file] = Deferred(kept, tuple(shape), partial(_make, file, entry, kept, device))
    return tensors


def _make(file: WeightFile, entry: Entry, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    import torch

    stored = file.dtype(entry.models[0])
    eight = stored.is_floating_point and stored.itemsize == 1
    own = torch.bfloat16 if eight else stored  # which holds all values of 8 bits, and can be joined
    return entry.rule.join([file.read(name, own, device) for name in entry.models]).to(dtype)
