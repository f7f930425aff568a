"""LoKr: the change is the Kronecker product of two matrices, of which the larger may be a product of low rank.

Source: Edalati et al. 2022 (KronA, arXiv:2212.10650); tensor names and sizes are those of LyCORIS.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from networks.factors import factors
from networks.types.change import ChangeLayer
from networks.types.functional import kronecker, tucker


class LokrLayer(ChangeLayer):
    """``w1 (x) w2`` with w1 (l, m) and w2 (k, n, ...), for a weight (l k, m n, ...)."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if _is_whole(self.names):
            self.alpha.fill_(self.rank)  # what readers divide by the rank

    def own_scale(self) -> float:
        return 1.0 if _is_whole(self.names) else super().own_scale()

    def tensor_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        out, width, *kernel = self.shape
        args = self.args
        (l, k), (m, n) = factors(out, args.factor), factors(width, args.factor)  # noqa: E741
        if args.unbalanced_factorization:
            l, k = k, l  # noqa: E741
        shapes: dict[str, tuple[int, ...]] = {"lokr_w1": (l, m)}
        if args.decompose_both and rank < max(l, m) / 2 and not args.full_matrix:
            shapes = {"lokr_w1_a": (l, rank), "lokr_w1_b": (rank, m)}
        if rank >= max(k, n) / 2 or args.full_matrix:
            return shapes | {"lokr_w2": (k, n, *kernel)}
        if args.use_tucker and any(side != 1 for side in kernel):
            return shapes | {"lokr_t2": (rank, rank, *kernel), "lokr_w2_a": (rank, k), "lokr_w2_b": (rank, n)}
        return shapes | {"lokr_w2_a": (k, rank), "lokr_w2_b": (rank, n * math.prod(kernel))}

    @property
    def scalar_name(self) -> str:
        return "lokr_w1" if "lokr_w1" in self.names else "lokr_w1_a"

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        factored = next((tensors[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in tensors), None)
        return max(tensors["lokr_w2"].shape[:2]) if factored is None else factored.shape[0]

    @classmethod
    def scale_of(cls, tensors: Mapping[str, Tensor]) -> float:
        return 1.0 if _is_whole(tensors) else super().scale_of(tensors)

    @classmethod
    def product(cls, tensors: Mapping[str, Tensor], rows: slice = slice(None)) -> Tensor:
        first, second = pair(tensors)
        start, stop, _ = rows.indices(first.shape[0] * second.shape[0])
        height = second.shape[0]
        above = start // height * height  # only the blocks of rows that are asked for
        blocks = first[above // height : -(-stop // height)]
        return kronecker(blocks, second)[start - above : stop - above]

    def init_weights(self, rng: torch.Generator) -> None:
        """Kaiming-uniform values with a = sqrt(5), and a second matrix that is 0."""
        for name in self.names:
            nn.init.kaiming_uniform_(getattr(self, name), a=math.sqrt(5), generator=rng)
        if self.scalar is None:
            nn.init.zeros_(self.lokr_w2 if "lokr_w2" in self.names else self.lokr_w2_b)

    def changed(self, x: Tensor, index: int, factor: float) -> Tensor:
        """Without the product, which is larger than its factors: ``w1 X w2^T`` with x as X, (m, n)."""
        first, second = pair(self.tensors())
        if self.geometry is not None:
            return self._changed_image(x, first * factor, second)
        height, start = second.shape[0], sum(self.rows[:index])
        above, stop = start // height, start + self.rows[index]
        folded = x.reshape(*x.shape[:-1], first.shape[1], -1)
        blocks = KroneckerLinear.apply(folded, first[above : -(-stop // height)] * factor, second)
        return blocks.flatten(-2)[..., start - above * height : stop - above * height]

    def _changed_image(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """(B, m n, H, W) -> (B, l k, H', W')."""
        second = second.reshape(second.shape[0], -1, *self.shape[2:])
        inner = self.operate(x.reshape(len(x) * first.shape[1], -1, *x.shape[2:]), second)
        inner = inner.reshape(len(x), first.shape[1], *inner.shape[1:])
        return torch.einsum("lm,bmkhw->blkhw", first, inner).flatten(1, 2)

    def fast_parameters(self) -> list[nn.Parameter]:
        return [getattr(self, self.scalar_name)]


def _is_whole(names: Container[str]) -> bool:
    """Whether neither matrix is a product: then there is no rank to divide by, and the scale is 1."""
    return "lokr_w1" in names and "lokr_w2" in names


class KroneckerLinear(torch.autograd.Function):
    """``w1 X w2^T`` for every X of a batch, which keeps X and the matrices only for the backward pass.

    X (..., m, n), w1 (l, m), w2 (k, n) -> (..., l, k).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(x, first, second)
        return first @ (x @ second.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, first, second = (tensor.to(gradient.dtype) for tensor in ctx.saved_tensors)  # autocast has left
        inner = x @ second.T
        grad_first = torch.einsum("...lk,...mk->lm", gradient, inner)
        inner = first.T @ gradient
        grad_second = torch.einsum("...mk,...mn->kn", inner, x)
        return inner @ second, grad_first, grad_second


def pair(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both matrices, each of them a product where it is stored as one; the second with its kernel, or flattened."""
    first = tensors.get("lokr_w1")
    if first is None:
        first = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    second = tensors.get("lokr_w2")
    if second is None and "lokr_t2" in tensors:
        second = tucker(tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
    elif second is None:
        second = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    return first, second
