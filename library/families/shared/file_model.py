"""A model in a weight file without its weights: its parts, and the names that their tensors have in the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from library.checkpoints.keymap import KeyMap
    from library.types import LoraTarget


@dataclass(frozen=True)
class FilePart:
    """A part of a model that networks may adapt. `model` is on torch's meta device."""

    name: str  # "denoiser", or the name of a text encoder
    model: nn.Module
    keys: KeyMap  # the file's names against those that `public` gives
    targets: list[LoraTarget]
    public: Callable[[str], str] = str  # from a tensor's name in `model` to that in `keys`


@dataclass(frozen=True)
class FileModel:
    """The parts of a file, text encoders first, and what `Writer.metadata` says of such a model."""

    parts: tuple[FilePart, ...]
    facts: dict[str, Any]
    original_code: str  # modelspec.implementation of whole models in this layout
