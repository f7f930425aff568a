"""LoRA-FA: LoRA whose down matrices stay as they were drawn, so that no activation need be kept for them.

Source: Zhang et al. 2023 (arXiv:2308.03303). The file is that of LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from networks import functional, lora, lora_fa_args
from networks.lora import load as load
from networks.lora_args import UNET_25, BlockLayout, LoraArgs
from networks.lora_files import read as read

if TYPE_CHECKING:
    from library.types import LoraTarget, Models
    from networks.lora_files import LoraFile


class LoraFaLayer(lora.LoraLayer):
    """A LoRA layer of which only the up matrix is trained."""

    def initialise(self, rng: torch.Generator) -> None:
        """Down normal with variance ``2 / (in + r)``, up zero: the network starts as the bare model."""
        down = self.lora_down.weight
        nn.init.normal_(down, std=(2 / (down.shape[1] + self.rank)) ** 0.5, generator=rng)
        nn.init.zeros_(self.lora_up.weight)

    def trained_parameters(self) -> list[nn.Parameter]:
        return [self.lora_up.weight]

    @torch.no_grad()
    def limit_norm(self, limit: float) -> None:
        factor = functional.max_norm_factor(self.lora_down.weight, self.lora_up.weight, self.scale, limit)
        self.lora_up.weight.mul_(factor.square().to(self.lora_up.weight.dtype))  # the root is for two matrices


def create(
    targets: Sequence[LoraTarget],
    models: Models,
    *,
    dim: int,
    alpha: float | None,
    dropout: float | None,
    args: Mapping[str, str],
    seed: int,
    layout: BlockLayout = UNET_25,
) -> lora.LoraNetwork:
    """As `networks.lora.create`."""
    parsed = _parsed(args, dropout, layout)
    return lora.build(targets, models, parsed, LoraFaLayer, dim=dim, alpha=alpha, seed=seed)


def from_weights(
    targets: Sequence[LoraTarget],
    models: Models,
    file: LoraFile,
    *,
    dropout: float | None,
    args: Mapping[str, str],
    layout: BlockLayout = UNET_25,
) -> lora.LoraNetwork:
    """As `networks.lora.from_weights`."""
    return lora.rebuild(targets, models, file, _parsed(args, dropout, layout), LoraFaLayer)


def _parsed(args: Mapping[str, str], dropout: float | None, layout: BlockLayout) -> LoraArgs:
    return lora_fa_args.parse(lora.with_dropout(args, dropout), layout)
