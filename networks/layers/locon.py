"""LoCon as LyCORIS has it: LoRA, with a core tensor for convolutions, a trained factor and weight decomposition."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.layers.change import ChangeLayer
from networks.layers.functional import tucker

DOWN, MID, UP = "lora_down.weight", "lora_mid.weight", "lora_up.weight"


class LoconLayer(ChangeLayer):
    """``up down``; with a core tensor of a convolution's kernel, ``up mid down``."""

    scalar_name = UP

    def tensor_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        out, width, *kernel = self.shape
        ones = [1] * len(kernel)
        if self.args.use_tucker and any(side != 1 for side in kernel):
            return {DOWN: (rank, width, *ones), MID: (rank, rank, *kernel), UP: (out, rank, *ones)}
        return {DOWN: (rank, width, *kernel), UP: (out, rank, *ones)}

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        return tensors[DOWN].shape[0]

    @classmethod
    def product(cls, tensors: Mapping[str, Tensor], rows: slice = slice(None)) -> Tensor:
        down, up = tensors[DOWN].flatten(1), tensors[UP][rows].flatten(1)
        if MID in tensors:
            return tucker(tensors[MID], up.T, down)
        return up @ down

    def init_weights(self, rng: torch.Generator) -> None:
        """Kaiming-uniform values with a = sqrt(5), and an up matrix that is 0."""
        for name in self.names:
            nn.init.kaiming_uniform_(getattr(self, name.replace(".", "_")), a=math.sqrt(5), generator=rng)
        if self.scalar is None:
            nn.init.zeros_(self.lora_up_weight)

    def pair(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        own = self.tensors()
        return None if MID in own else (own[UP][rows].flatten(1), own[DOWN].flatten(1))

    def changed(self, x: Tensor, index: int, factor: float) -> Tensor:
        if MID not in self.names:
            return super().changed(x, index, factor)
        own = self.tensors()
        hidden = F.conv2d(F.conv2d(x, own[DOWN]), own[MID], **self.geometry)
        return F.conv2d(hidden * factor, own[UP])

    def fast_parameters(self) -> list[nn.Parameter]:
        return [self.lora_up_weight]
