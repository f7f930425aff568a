"""LoHa: the change is the elementwise product of two products of low rank (FedPara, arXiv:2108.06098)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from networks.layers.change import ChangeLayer
from networks.layers.functional import Hadamard, tucker


class LohaLayer(ChangeLayer):
    """``(w1_a w1_b) * (w2_a w2_b)``; with a core tensor t of a convolution, each is a Tucker decomposition."""

    scalar_name = "hada_w1_a"

    def tensor_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        out, width, *kernel = self.shape
        if self.args.use_tucker and any(side != 1 for side in kernel):
            sides = {"a": (rank, out), "b": (rank, width)}
            cores = dict.fromkeys(("hada_t1", "hada_t2"), (rank, rank, *kernel))
        else:
            sides = {"a": (out, rank), "b": (rank, self.shape[1:].numel())}
            cores = {}
        return cores | {f"hada_w{half}_{side}": shape for half in "12" for side, shape in sides.items()}

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        return tensors["hada_w1_b"].shape[0]

    @classmethod
    def product(cls, tensors: Mapping[str, Tensor], rows: slice = slice(None)) -> Tensor:
        a1, b1, a2, b2 = (tensors[f"hada_w{half}_{side}"] for half in "12" for side in "ab")
        if "hada_t1" in tensors:
            return tucker(tensors["hada_t1"], a1[:, rows], b1) * tucker(tensors["hada_t2"], a2[:, rows], b2)
        return Hadamard.apply(a1[rows], b1, a2[rows], b2)

    def pair(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        """With the square of the rank: ``sum_r a1_ir b1_rj sum_s a2_is b2_sj = sum_rs (a1_ir a2_is) (b1_rj b2_sj)``."""
        own, square, flat = self.tensors(), self.rank**2, self.shape[1:].numel()
        if "hada_t1" in own or square * (self.shape[0] + flat) >= self.shape.numel():
            return None
        a1, b1, a2, b2 = (own[f"hada_w{half}_{side}"] for half in "12" for side in "ab")
        up = a1[rows, :, None] * a2[rows, None, :]
        return up.flatten(1), (b1[:, None] * b2).flatten(0, 1)

    def init_weights(self, rng: torch.Generator) -> None:
        """Normal values, of which one factor is 0."""
        core = "hada_t1" in self.names
        for name in self.names:
            std = 0.1 if name.startswith("hada_t") or name.endswith("_a") else 1.0
            nn.init.normal_(getattr(self, name), std=std, generator=rng)
        if self.scalar is None:
            nn.init.zeros_(self.hada_w1_a if core else self.hada_w2_a)

    def fast_parameters(self) -> list[nn.Parameter]:
        return [self.hada_w2_a]
