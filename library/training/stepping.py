"""How the optimizer steps: all weights at once, a few at a time, or each one inside the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.options.optimizer import is_adafactor, steps_each_alone
from library.training.precision import StochasticRounding

if TYPE_CHECKING:
    from library.options.base import Options

_PART = 1 << 26  # numbers that are stepped together where copies in float32 are needed: 0.5 GiB with their gradients


class OptimizerStepper:
    """The optimizer's step as the options want it. `prepared` is accelerate's, around `optimizer`.

    Args: parts: weights that are stepped together inside the backward pass; None: none are.
    """

    def __init__(
        self,
        opts: Options,
        optimizer: torch.optim.Optimizer,
        prepared: Any,
        parts: Sequence[Sequence[Tensor]] | None = None,
    ):
        self._optimizer, self._prepared = optimizer, prepared
        self._in_backward = opts.optimizer.fused_backward_pass
        self._together = None if parts is None else FusedGroups(optimizer, parts)
        rounds = uses_stochastic_rounding(opts)
        self._rounding = StochasticRounding(optimizer, opts.training.seed) if rounds else None
        self._in_parts = rounds and steps_each_alone(opts.optimizer)
        if self._in_backward:
            step_in_backward(optimizer)

    @property
    def inside_backward(self) -> bool:
        """Whether weights are stepped before all gradients are there."""
        return self._in_backward or self._together is not None

    def start(self, step: int) -> None:
        """Before the forward pass; `step` optimizer steps are done."""
        if self._rounding is not None:
            self._rounding.step = step

    def step(self) -> None:
        """After the backward pass, with the gradients as they shall be."""
        if self._in_backward:
            return
        if self._together is not None:
            self._together.finish()
        elif self._in_parts:
            step_chunked(self._optimizer)
        else:
            self._prepared.step()


def uses_stochastic_rounding(opts: Options) -> bool:
    """Whether weights are written with stochastic rounding: on request, and by AdaFactor in bf16 inside backward.

    Command lines of the latter kind have always counted on it without naming it.
    """
    fused = opts.optimizer.fused_backward_pass and is_adafactor(opts.optimizer)
    return opts.memory.stochastic_rounding or (fused and opts.memory.full_bf16)


def step_in_backward(optimizer: torch.optim.Optimizer) -> list[Any]:
    """From now on every weight is stepped as soon as its gradient is there, which is freed at once.

    The weights come out as `optimizer.step()` would make them after the backward pass, if the optimizer looks at each
    weight alone (`steps_each_alone`): a weight's gradient is whole only when nothing needs its old value any more.

    Returns: handles of the hooks, to take them away.
    """
    places = {id(w): number for number, group in enumerate(optimizer.param_groups) for w in group["params"]}

    def step(weight: Tensor) -> None:
        step_subset(optimizer, {places[id(weight)]: [weight]})
        weight.grad = None

    weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.requires_grad]
    return [weight.register_post_accumulate_grad_hook(step) for weight in weights]


class FusedGroups:
    """Steps each part of the weights inside the backward pass, once the gradients of all of the part are there.

    For every optimizer that keeps what it knows by weight. The weights come out as one `optimizer.step()` makes them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parts: Sequence[Sequence[Tensor]]):
        self._optimizer = optimizer
        self._places = {id(w): number for number, group in enumerate(optimizer.param_groups) for w in group["params"]}
        self._missing: list[int] = []
        self._parts = [[weight for weight in part if weight.requires_grad] for part in parts]
        self._parts = [part for part in self._parts if part]
        for number, part in enumerate(self._parts):
            self._missing.append(len(part))
            for weight in part:
                weight.register_post_accumulate_grad_hook(partial(self._arrived, number))

    def finish(self) -> None:
        """After the backward pass: steps the parts of which some weights had no gradient."""
        for number, part in enumerate(self._parts):
            if self._missing[number] != len(part):
                self._step(number)

    def _arrived(self, number: int, weight: Tensor) -> None:
        self._missing[number] -= 1
        if not self._missing[number]:
            self._step(number)

    def _step(self, number: int) -> None:
        chosen: dict[int, list[Tensor]] = {}
        for weight in self._parts[number]:
            if weight.grad is not None:
                chosen.setdefault(self._places[id(weight)], []).append(weight)
        step_subset(self._optimizer, chosen)
        for weight in self._parts[number]:
            weight.grad = None
        self._missing[number] = len(self._parts[number])


def equal_parts(weights: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """The weights in `count` runs, or fewer, of about as many numbers each."""
    total, done = sum(weight.numel() for weight in weights), 0
    parts: list[list[Tensor]] = [[] for _ in range(count)]
    for weight in weights:
        parts[min((done + weight.numel() // 2) * count // max(total, 1), count - 1)].append(weight)
        done += weight.numel()
    return [part for part in parts if part]


def parts_by_block(weights: Sequence[Tensor], blocks: Sequence[nn.Module]) -> list[list[Tensor]]:
    """Each block's weights, and in the end those of no block."""
    left = {id(weight): weight for weight in weights}
    parts = [[left.pop(id(w)) for w in block.parameters() if id(w) in left] for block in blocks]
    return [part for part in [*parts, list(left.values())] if part]


def step_chunked(optimizer: torch.optim.Optimizer, most: int = _PART) -> None:
    """``optimizer.step()`` over at most `most` numbers at a time, or one weight where that is larger."""
    for part in list(_parts(optimizer.param_groups, most)):
        step_subset(optimizer, part)


def step_subset(optimizer: torch.optim.Optimizer, chosen: Mapping[int, Sequence[Tensor]]) -> None:
    """A step of some weights, by the number of their group, as if the others had no gradient."""
    groups = optimizer.param_groups
    optimizer.param_groups = [{**groups[number], "params": list(weights)} for number, weights in chosen.items()]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups


def _parts(groups: Sequence[Mapping[str, Any]], most: int) -> Iterator[dict[int, list[Tensor]]]:
    part: dict[int, list[Tensor]] = {}
    size = 0
    for number, group in enumerate(groups):
        for weight in group["params"]:
            if weight.grad is None:
                continue
            if part and size + weight.numel() > most:
                yield part
                part, size = {}, 0
            part.setdefault(number, []).append(weight)
            size += weight.numel()
    if part:
        yield part
