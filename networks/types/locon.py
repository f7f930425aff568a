"""LoCon as LyCORIS has it: LoRA, with a core tensor for convolutions, a trained factor and weight decomposition."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.types.change import ChangeLayer
from networks.types.functional import tucker

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

    def changed(self, x: Tensor, index: int, factor: float) -> Tensor:
        own, start = self.tensors(), sum(self.rows[:index])
        down, up = own[DOWN], own[UP][start : start + self.rows[index]]
        if self.geometry is None:
            return F.linear(F.linear(x, down.flatten(1)) * factor, up.flatten(1))
        kernels = self.shape[2:]
        if MID in own:
            hidden = F.conv2d(x, down.reshape(*down.shape[:2], 1, 1))
            hidden = F.conv2d(hidden, own[MID], **self.geometry)
        else:
            hidden = F.conv2d(x, down.reshape(down.shape[0], -1, *kernels), **self.geometry)
        return F.conv2d(hidden * factor, up.reshape(*up.shape[:2], 1, 1))

    def squared_norms(self, index: int) -> Tensor:
        """As small products: ``|W + s U D|^2 = |W|^2 + 2 s <W D^T, U> + s^2 <U (D D^T), U>`` by row."""
        own, start = self.tensors(), sum(self.rows[:index])
        if MID in own:
            return super().squared_norms(index)
        down, up = own[DOWN].flatten(1), own[UP][start : start + self.rows[index]].flatten(1)
        weight = self._live[index].weight.detach().flatten(1).to(down.dtype)
        cross, square = ((weight @ down.T) * up).sum(1), ((up @ (down @ down.T)) * up).sum(1)
        return weight.square().sum(1) + 2 * self.scale * cross + self.scale**2 * square

    def fast_parameters(self) -> list[nn.Parameter]:
        return [self.lora_up_weight]
