"""Compares the contents of a saved optimizer state with the optimizer that is to continue from it.

Kernels take the shapes of an optimizer's tensors for granted, and read and write beyond those that are smaller.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# settings that do not distinguish optimizers
_ANY_OPTIMIZERS = {
    "params",
    "param_names",
    "name",
    "initial_lr",
    "foreach",
    "fused",
    "maximize",
    "capturable",
    "differentiable",
}
_STEPS = 2  # of a trial: some tensors are made in the second one


def check(saved: Any, optimizer: torch.optim.Optimizer) -> None:
    """Finds out whether `optimizer` can load a state and step with it. Nothing is changed.

    Args: saved: what `optimizer.state_dict()` gave, as a file holds it.
    Raises: ValueError: says what does not fit.
    """
    whole = isinstance(saved, dict) and isinstance(saved.get("state"), dict)
    groups = saved.get("param_groups") if whole else None
    if not isinstance(groups, list) or not all(
        isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups
    ):
        raise ValueError("it is no state of an optimizer")
    counts = [len(group["params"]) for group in groups]
    wanted = [len(group["params"]) for group in optimizer.param_groups]
    if counts != wanted:
        raise ValueError(f"it has groups of {_listed(counts)} tensors, and the run has {_listed(wanted)}")
    shapes = _Shapes(optimizer)
    for group, saved_group in zip(optimizer.param_groups, groups, strict=True):
        for name, value in group.items():
            if name != "params" and name in saved_group and not alike(value, saved_group[name]):
                raise ValueError(f"its {name} is {str(saved_group[name])[:40]!r}")
        foreign = saved_group.keys() - group.keys() - _ANY_OPTIMIZERS
        for weight, number in zip(group["params"], saved_group["params"], strict=True):
            values = saved["state"].get(number)
            if values is not None:
                _check_values(number, values, shapes.of(group, weight), tuple(weight.shape), foreign=bool(foreign))


def _listed(counts: list[int]) -> str:
    return " + ".join(map(str, counts)) or "0"


def alike(ours: Any, theirs: Any) -> bool:
    """Whether a saved value is of the kind that ours is: a number, a list of as many, a text; anything for None."""
    if isinstance(ours, bool | int | float):
        number = theirs.item() if isinstance(theirs, Tensor) and theirs.numel() == 1 else theirs
        if number is None:
            return isinstance(ours, bool)
        return isinstance(number, bool | int | float) and not math.isnan(number)
    if isinstance(ours, list | tuple):
        pairs = isinstance(theirs, list | tuple) and len(theirs) == len(ours)
        return pairs and all(map(alike, ours, theirs))
    return not isinstance(ours, str) or isinstance(theirs, str)


def _check_values(
    number: int, values: Any, wanted: Mapping[str, set[tuple[int, ...]]], whole: tuple[int, ...], *, foreign: bool
) -> None:
    """Raises: ValueError: what is known of one weight is not as the optimizer keeps it.

    Args:
        wanted: shapes by name; empty: not known.
        whole: the weight's.
        foreign: whether the state has settings that the optimizer does not know.
    """
    if not isinstance(values, dict):
        raise ValueError(f"what it has of tensor {number} is no table")
    missing = [name for name in wanted if name not in values]
    if missing and values:
        raise ValueError(f"it has no {missing[0]} of tensor {number}, so another optimizer made it")
    for name, value in values.items():
        if not isinstance(value, Tensor):
            continue
        if foreign and wanted and name not in wanted:
            raise ValueError(f"it has {name} of tensor {number}, so another optimizer made it")
        allowed = wanted.get(name, {whole, ()})
        if tuple(value.shape) not in allowed and not (value.numel() == 1 and () in allowed):
            expected = " or ".join(map(str, sorted(map(list, allowed))))
            raise ValueError(f"its {name} of tensor {number} has the shape {list(value.shape)}, not {expected}")


class _Shapes:
    """The shapes of what an optimizer keeps of a weight, found by stepping stand-ins of its shape."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self._known: dict[Any, dict[str, set[tuple[int, ...]]]] = {}

    def of(self, group: Mapping[str, Any], weight: Tensor) -> dict[str, set[tuple[int, ...]]]:
        """The shapes of a weight's state by name. Empty where no trial is possible."""
        key = (tuple(weight.shape), weight.dtype, id(group))
        if key not in self._known:
            self._known[key] = self._tried(group, weight)
        return self._known[key]

    def _tried(self, group: Mapping[str, Any], weight: Tensor) -> dict[str, set[tuple[int, ...]]]:
        found: dict[str, set[tuple[int, ...]]] = {}
        for value in (0.0, 1e-3):  # a weight that is all zero may need less to be remembered
            for name, one in self._stepped(group, weight, value).items():
                found.setdefault(name, set()).add(tuple(one.shape) if isinstance(one, Tensor) else ())
        return found

    def _stepped(self, group: Mapping[str, Any], weight: Tensor, value: float) -> Mapping[str, Any]:
        device = weight.device
        probe = torch.nn.Parameter(torch.full(weight.shape, value, dtype=weight.dtype, device=device))
        trial = object.__new__(type(self._optimizer))  # `copy` would leave out what optimizers keep beside their groups
        vars(trial).update(vars(self._optimizer))
        trial._optimizer_step_pre_hooks = trial._optimizer_step_post_hooks = {}  # they are about the real weights
        trial.state = defaultdict(dict)
        if weight in self._optimizer.state:  # some make it when they are made
            trial.state[probe] = copy.deepcopy(self._optimizer.state[weight])
        trial.param_groups = [{**copy.deepcopy({k: v for k, v in group.items() if k != "params"}), "params": [probe]}]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                for _ in range(_STEPS):
                    probe.grad = torch.full_like(probe, 1e-3)
                    type(trial).step(trial)  # the instance's own may be bound to the real one
            except Exception:  # of any package: then the file's words are all that is known
                return {}
        return trial.state.get(probe, {})
