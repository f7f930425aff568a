"""LoKr: the change is the Kronecker product of two matrices, of which the larger may be a product of low rank.

Source: Edalati et al. 2022 (KronA, arXiv:2212.10650); tensor names and sizes are those of LyCORIS.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.factors import factors
from networks.layers.change import ChangeLayer
from networks.layers.functional import in_computing_dtype, kronecker, tucker


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
        first, second = both(tensors)
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
        own = self.tensors()
        first, rows = _first(own), self.rows_of(index)
        height = self.shape[0] // len(first)
        blocks = slice(rows.start // height, -(-rows.stop // height))
        change = (self._folded if self.geometry is None else self._folded_image)(x, first[blocks] * factor, own)
        start = blocks.start * height
        return change if self.geometry else change[..., rows.start - start : rows.stop - start]

    def _folded(self, x: Tensor, first: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """(..., m n) -> (..., l k). `first`: (l, m)."""
        folded = x.unflatten(-1, (first.shape[1], -1))
        chain = _chain(own)
        if chain is None:
            second = _second(own).flatten(1)  # of a 1x1 convolution in some files
            return KroneckerLinear.apply(*in_computing_dtype(folded, first, second)).flatten(-2)
        up, down = chain  # w1 is applied where X is narrowest, at the rank's width
        return F.linear(first @ F.linear(folded, down), up).flatten(-2)

    def _folded_image(self, x: Tensor, first: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """(B, m n, H, W) -> (B, l k, H', W')."""
        pieces = x.unflatten(1, (first.shape[1], -1)).flatten(0, 1)
        if "lokr_t2" in own:
            hidden = F.conv2d(pieces, own["lokr_w2_b"][..., None, None])
            hidden, up = self.operate(hidden, own["lokr_t2"]), own["lokr_w2_a"].T
        else:
            up, second = _chain(own) or (None, _second(own))
            hidden = self.operate(pieces, second.reshape(len(second), -1, *self.shape[2:]))
        hidden = torch.einsum("lm,bmkhw->blkhw", first, hidden.unflatten(0, (len(x), -1)))
        if up is not None:
            hidden = F.conv2d(hidden.flatten(0, 1), up[..., None, None]).unflatten(0, (len(x), -1))
        return hidden.flatten(1, 2)

    def fast_parameters(self) -> list[nn.Parameter]:
        return [getattr(self, self.scalar_name)]


def _is_whole(names: Container[str]) -> bool:
    """Whether neither matrix is a product: then there is no rank to divide by, and the scale is 1."""
    return "lokr_w1" in names and "lokr_w2" in names


class KroneckerLinear(torch.autograd.Function):
    """``w1 X w2^T`` for every X of a batch, which keeps X and the matrices only for the backward pass.

    X (..., m, n), w1 (l, m), w2 (k, n) -> (..., l, k). The matrix that leaves less for the other one is applied first.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(x, first, second)
        (l, m), (k, n) = first.shape, second.shape  # noqa: E741
        ctx.narrows = m * k <= l * n
        return first @ (x @ second.T) if ctx.narrows else (first @ x) @ second.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, first, second = ctx.saved_tensors
        if ctx.narrows:
            grad_first = torch.einsum("...lk,...mk->lm", gradient, x @ second.T)
            inner = first.T @ gradient
            return inner @ second, grad_first, torch.einsum("...mk,...mn->kn", inner, x)
        inner = gradient @ second
        grad_second = torch.einsum("...lk,...ln->kn", gradient, first @ x)
        return first.T @ inner, torch.einsum("...ln,...mn->lm", inner, x), grad_second


def both(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The matrices whose Kronecker product the change is: (l, m) and (k, n, kernel), or flattened to two axes."""
    return _first(tensors), _second(tensors)


def _first(tensors: Mapping[str, Tensor]) -> Tensor:
    """(l, m)."""
    whole = tensors.get("lokr_w1")
    return tensors["lokr_w1_a"] @ tensors["lokr_w1_b"] if whole is None else whole


def _second(tensors: Mapping[str, Tensor]) -> Tensor:
    """(k, n, kernel), or flattened to two axes."""
    if "lokr_w2" in tensors:
        return tensors["lokr_w2"]
    if "lokr_t2" in tensors:
        return tucker(tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
    return tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]


def _chain(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """The second matrix as a product (k, r), (r, n * ...), where that costs less than the matrix itself."""
    if "lokr_w2" in tensors or "lokr_t2" in tensors:
        return None
    up, down = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
    return (up, down) if up.numel() + down.numel() < len(up) * down.shape[1] else None
