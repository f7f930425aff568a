"""LoRA-FA: LoRA whose down matrices stay as they were drawn, so that no activation need be kept for them.

Source: Zhang et al. 2023 (arXiv:2308.03303). The file is that of LoRA.
"""

from __future__ import annotations

import torch
from torch import nn

from networks.layers import functional
from networks.layers.lora import LoraLayer


class LoraFaLayer(LoraLayer):
    """A LoRA layer of which only the up matrix is trained."""

    def init_weights(self, rng: torch.Generator) -> None:
        """Down normal with variance ``2 / (in + r)``, up zero: the network starts as the bare model."""
        down = self.lora_down.weight
        nn.init.normal_(down, std=(2 / (down.shape[1] + self.rank)) ** 0.5, generator=rng)
        nn.init.zeros_(self.lora_up.weight)

    def trained_parameters(self) -> list[nn.Parameter]:
        return [self.lora_up.weight]

    @torch.no_grad()
    def limit_norm(self, limit: float) -> None:
        factor = functional.max_norm_factor(self.lora_down.weight, self.lora_up.weight, self.scale, limit)
        self.lora_up.weight.mul_(factor.square())  # the root is for two matrices
