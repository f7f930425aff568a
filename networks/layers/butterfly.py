"""A chain of rotations in which stage i mixes elements that are ``2^i b / 2`` apart: BOFT (arXiv:2311.06243).

Between stages, vectors stay in blocks, (count, vectors, b): each block has half of its elements from one place and half
from another, ``2^stage b / 2`` further on. From one stage to the next they are copied once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def turn_in_stages(vectors: Tensor, rotations: Tensor, *, orthogonal: bool = True) -> Tensor:
    """(..., count * b) through every stage of (stages, count, b, b), in the dtype of the rotations.

    Args: orthogonal: what the rotations are; then the backward pass keeps less, see `Stages`.
    """
    with _in_own_dtype(vectors):
        rows = vectors.to(rotations.dtype).flatten(0, -2) if vectors.dim() > 1 else vectors.to(rotations.dtype)[None]
        # Files have pairs in a row, (h, 2) on both sides of a block; here halves are, (2, h).
        halves = rotations.unflatten(-1, (-1, 2)).mT.flatten(-2).unflatten(-2, (-1, 2)).transpose(-3, -2)
        turn = Stages.apply if orthogonal and not torch.compiler.is_compiling() else _through
        return turn(rows, halves.flatten(-3, -2)).reshape(vectors.shape)


def _in_own_dtype(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast, which shapes alone (the meta device) do not have."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


class Stages(torch.autograd.Function):
    """The chain, of which only the result is kept: each stage's input is its output, turned back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rotations: Tensor) -> Tensor:
        rows = _through(rows, rotations)
        ctx.save_for_backward(rows, rotations)
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        rows, rotations = ctx.saved_tensors
        slopes, last = torch.empty_like(rotations), len(rotations) - 1
        with _in_own_dtype(gradient):
            blocks, slope = (_blocks_at_end(each, rotations[last], last) for each in (rows, gradient))
            for stage in reversed(range(len(rotations))):
                blocks = blocks @ rotations[stage]
                torch.matmul(slope.mT, blocks, out=slopes[stage])
                slope = slope @ rotations[stage]
                if stage:
                    blocks, slope = _exchanged(blocks, stage - 1), _exchanged(slope, stage - 1)
        return slope.transpose(0, 1).reshape(rows.shape), slopes


def _through(rows: Tensor, rotations: Tensor) -> Tensor:
    """(vectors, count * b)."""
    blocks = rows.unflatten(-1, (rotations.shape[1], -1)).transpose(0, 1)
    for stage, rotation in enumerate(rotations):
        blocks = (_exchanged(blocks, stage - 1) if stage else blocks) @ rotation.mT
    count, _, size = blocks.shape
    stage = len(rotations) - 1
    return blocks.unflatten(-1, (2, -1)).unflatten(0, (-1, 2**stage)).permute(2, 0, 3, 1, 4).reshape(-1, count * size)


def _exchanged(blocks: Tensor, stage: int) -> Tensor:
    """Blocks of a stage as those of the next one, and the other way round: pairs of blocks exchange halves."""
    apart = blocks.unflatten(-1, (2, -1)).unflatten(0, (-1, 2, 2**stage))
    return apart.transpose(1, 4).reshape(blocks.shape)


def _blocks_at_end(rows: Tensor, rotation: Tensor, stage: int) -> Tensor:
    apart = rows.reshape(len(rows), len(rotation) >> stage, 2, 2**stage, -1)
    return apart.permute(1, 3, 0, 2, 4).reshape(len(rotation), len(rows), -1)
