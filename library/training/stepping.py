"""How the optimizer steps: all weights at once, a few at a time, or each one inside the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.options.optimizer import steps_each_alone
from library.training.precision import StochasticRounding

if TYPE_CHECKING:
    from library.options.base import Options

_PART = 1 << 26  # numbers that are stepped together where copies in float32 are needed: 0.5 GiB with their gradients


class Stepper:
    """The optimizer's step as the options want it. `prepared` is accelerate's, around `optimizer`."""

    def __init__(self, opts: Options, optimizer: torch.optim.Optimizer, prepared: Any):
        self._optimizer, self._prepared = optimizer, prepared
        self._in_backward = opts.optimizer.fused_backward_pass
        rounds = opts.memory.stochastic_rounding
        self._rounding = StochasticRounding(optimizer, opts.training.seed) if rounds else None
        self._in_parts = rounds and steps_each_alone(opts.optimizer)
        if self._in_backward:
            step_in_backward(optimizer)

    def start(self, step: int) -> None:
        """Before the forward pass; `step` optimizer steps are done."""
        if self._rounding is not None:
            self._rounding.step = step

    def step(self) -> None:
        """After the backward pass, with the gradients as they shall be."""
        if self._in_backward:
            return
        if self._in_parts:
            step_in_parts(self._optimizer)
        else:
            self._prepared.step()


def step_in_backward(optimizer: torch.optim.Optimizer) -> list[Any]:
    """From now on every weight is stepped as soon as its gradient is there, which is freed at once.

    The weights come out as `optimizer.step()` would make them after the backward pass, if the optimizer looks at each
    weight alone (`steps_each_alone`): a weight's gradient is whole only when nothing needs its old value any more.

    Returns: handles of the hooks, to take them away.
    """
    places = {id(w): number for number, group in enumerate(optimizer.param_groups) for w in group["params"]}

    def step(weight: Tensor) -> None:
        step_only(optimizer, {places[id(weight)]: [weight]})
        weight.grad = None

    weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.requires_grad]
    return [weight.register_post_accumulate_grad_hook(step) for weight in weights]


def step_in_parts(optimizer: torch.optim.Optimizer, most: int = _PART) -> None:
    """``optimizer.step()`` over at most `most` numbers at a time, or one weight where that is larger."""
    for part in list(_parts(optimizer.param_groups, most)):
        step_only(optimizer, part)


def step_only(optimizer: torch.optim.Optimizer, chosen: Mapping[int, Sequence[Tensor]]) -> None:
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
