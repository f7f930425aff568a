"""LoRA for FLUX.1: on the transformer, CLIP-L and T5. See `networks.lora_flux_args`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from networks import lora_dit
from networks.lora_dit import load as load
from networks.lora_files import read as read
from networks.lora_flux_args import LAYOUT

if TYPE_CHECKING:
    from library.types import LoraTarget, Models
    from networks.lora import LoraNetwork
    from networks.lora_files import LoraFile


def create(
    targets: Sequence[LoraTarget],
    models: Models,
    *,
    dim: int,
    alpha: float | None,
    dropout: float | None,
    args: Mapping[str, str],
    seed: int,
) -> LoraNetwork:
    """As `networks.lora_dit.create`."""
    return lora_dit.create(LAYOUT, targets, models, dim=dim, alpha=alpha, dropout=dropout, args=args, seed=seed)


def from_weights(
    targets: Sequence[LoraTarget],
    models: Models,
    file: LoraFile,
    *,
    dropout: float | None,
    args: Mapping[str, str],
) -> LoraNetwork:
    """As `networks.lora_dit.from_weights`."""
    return lora_dit.from_weights(LAYOUT, targets, models, file, dropout=dropout, args=args)
