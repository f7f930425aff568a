"""When the optimizer steps which weights: all at once, in chunks, or inside the backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.options.optimizer import is_adafactor, steps_each_weight_independently
from library.training import adafactor
from library.training.precision import StochasticRounding

if TYPE_CHECKING:
    from library.options.base import Options

_CHUNK = 1 << 26  # elements; with gradients, their float32 copies take 0.5 GiB


class OptimizerStepper:
    """Steps the optimizer as the options say. `prepared` is accelerate's wrapper of `optimizer`.

    Args: parts: weights that are stepped together inside the backward pass; None: none are, or each by itself.
    """

    def __init__(
        self,
        opts: Options,
        optimizer: torch.optim.Optimizer,
        prepared: torch.optim.Optimizer,
        parts: Sequence[Sequence[Tensor]] | None = None,
    ):
        self._optimizer, self._prepared = optimizer, prepared
        self._in_backward = opts.optimizer.fused_backward_pass and parts is None
        self._groups = None if parts is None else FusedGroups(optimizer, parts)
        rounds = uses_stochastic_rounding(opts)
        self._rounding = StochasticRounding(optimizer, opts.training.seed) if rounds else None
        self._chunked = rounds and steps_each_weight_independently(opts.optimizer)
        if self._in_backward:
            step_in_backward(optimizer)

    @property
    def inside_backward(self) -> bool:
        """Whether weights are stepped before all gradients are there."""
        return self._in_backward or self._groups is not None

    def start(self, step: int) -> None:
        """Call before the forward pass. `step`: optimizer steps done."""
        if self._rounding is not None:
            self._rounding.step = step

    def step(self) -> None:
        """Call after the backward pass, with averaged and clipped gradients."""
        if self._in_backward:
            return
        if self._groups is not None:
            self._groups.finish()
        elif self._chunked:
            step_chunked(self._optimizer)
        else:
            self._prepared.step()


def uses_stochastic_rounding(opts: Options) -> bool:
    """Whether weights are rounded stochastically: on request, and for AdaFactor in bf16 inside the backward pass.

    The latter has always been so, and command lines rely on it.
    """
    fused = opts.optimizer.fused_backward_pass and is_adafactor(opts.optimizer)
    return opts.memory.stochastic_rounding or (fused and opts.memory.full_bf16)


def step_in_backward(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Registers hooks that step every weight as soon as its gradient is accumulated, and free the gradient.

    The result equals that of `optimizer.step()` after the backward pass if the optimizer updates each weight
    independently (`steps_each_weight_independently`), as nothing needs a weight once its gradient is complete.

    Returns: the handles of the hooks, to remove them.
    """
    group_of = {id(w): number for number, group in enumerate(optimizer.param_groups) for w in group["params"]}

    def step(weight: Tensor) -> None:
        step_subset(optimizer, {group_of[id(weight)]: [weight]})
        weight.grad = None

    weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.requires_grad]
    return [weight.register_post_accumulate_grad_hook(step) for weight in weights]


class FusedGroups:
    """Steps each part of the weights inside the backward pass, once all gradients of the part are accumulated.

    For every optimizer whose state is kept per weight. The result equals that of one `optimizer.step()`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parts: Sequence[Sequence[Tensor]]):
        self._optimizer = optimizer
        self._group_of = {id(w): number for number, group in enumerate(optimizer.param_groups) for w in group["params"]}
        self._missing: list[int] = []
        self._parts = [[weight for weight in part if weight.requires_grad] for part in parts]
        self._parts = [part for part in self._parts if part]
        for number, part in enumerate(self._parts):
            self._missing.append(len(part))
            for weight in part:
                weight.register_post_accumulate_grad_hook(partial(self._on_gradient, number))

    def finish(self) -> None:
        """Steps the parts of which some weights had no gradient. Call after the backward pass."""
        for number, part in enumerate(self._parts):
            if self._missing[number] != len(part):
                self._step(number)

    def _on_gradient(self, number: int, weight: Tensor) -> None:
        self._missing[number] -= 1
        if not self._missing[number]:
            self._step(number)

    def _step(self, number: int) -> None:
        chosen: dict[int, list[Tensor]] = {}
        for weight in self._parts[number]:
            if weight.grad is not None:
                chosen.setdefault(self._group_of[id(weight)], []).append(weight)
        step_subset(self._optimizer, chosen)
        for weight in self._parts[number]:
            weight.grad = None
        self._missing[number] = len(self._parts[number])


def equal_parts(weights: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """Divides the weights, in order, into at most `count` parts of about equal numbers of elements."""
    total, done = sum(weight.numel() for weight in weights), 0
    parts: list[list[Tensor]] = [[] for _ in range(count)]
    for weight in weights:
        parts[min((done + weight.numel() // 2) * count // max(total, 1), count - 1)].append(weight)
        done += weight.numel()
    return [part for part in parts if part]


def parts_by_block(weights: Sequence[Tensor], blocks: Sequence[nn.Module]) -> list[list[Tensor]]:
    """Divides the weights by block; those of no block are the last part."""
    left = {id(weight): weight for weight in weights}
    parts = [[left.pop(id(w)) for w in block.parameters() if id(w) in left] for block in blocks]
    return [part for part in [*parts, list(left.values())] if part]


def listed_blocks(module: nn.Module) -> list[nn.Module]:
    """The members of a module's outermost lists, which are its repeated blocks."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [block for child in module.children() for block in listed_blocks(child)]


def step_chunked(optimizer: torch.optim.Optimizer, most: int = _CHUNK) -> None:
    """``optimizer.step()`` over at most `most` elements at a time, or one weight where that is larger."""
    parts: list[dict[int, list[Tensor]]] = [{}]
    size = 0
    for number, group in enumerate(optimizer.param_groups):
        for weight in group["params"]:
            if weight.grad is None:
                continue
            if parts[-1] and size + weight.numel() > most:
                parts.append({})
                size = 0
            parts[-1].setdefault(number, []).append(weight)
            size += weight.numel()
    for part in filter(None, parts):
        step_subset(optimizer, part)


def chunks_by_block(weights: Sequence[Tensor], blocks: Sequence[nn.Module], most: int = _CHUNK) -> list[list[Tensor]]:
    """`parts_by_block`, each cut so that no part has more than `most` elements, but for single weights."""
    chunks: list[list[Tensor]] = []
    for part in parts_by_block(weights, blocks):
        size = 0
        for number, weight in enumerate(part):
            if not number or size + weight.numel() > most:
                chunks.append([])
                size = 0
            chunks[-1].append(weight)
            size += weight.numel()
    return chunks


def parts_inside_backward(
    opts: Options, weights: Sequence[Tensor], blocks: Sequence[nn.Module], *, swapped: bool
) -> list[list[Tensor]] | None:
    """The weights by the parts that are stepped inside the backward pass; None: they are not, or each by itself.

    Args: swapped: whether blocks are swapped; their weights leave the device one by one.
    """
    fused = opts.fused
    if opts.optimizer.fused_backward_pass:
        # fewer operations than one by one, and hardly more memory
        return chunks_by_block(weights, blocks) if is_adafactor(opts.optimizer) and not swapped else None
    if not fused.in_use:
        return None
    if fused.blockwise_fused_optimizers:
        return parts_by_block(weights, blocks)
    return equal_parts(weights, fused.fused_optimizer_groups)


def step_subset(optimizer: torch.optim.Optimizer, chosen: Mapping[int, Sequence[Tensor]]) -> None:
    """Steps only the `chosen` weights, which are keyed by the index of their group."""
    groups = optimizer.param_groups
    optimizer.param_groups = [{**groups[number], "params": list(weights)} for number, weights in chosen.items()]
    try:
        if adafactor.steps_together(optimizer):
            adafactor.step(optimizer)
            optimizer._opt_called = True  # type: ignore[attr-defined]  # torch warns of steps it has not seen
        else:
            optimizer.step()
    finally:
        optimizer.param_groups = groups
