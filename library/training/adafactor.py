"""AdaFactor's step over many weights at once: the same numbers as transformers' own, in far fewer operations.

Formulas: Shazeer and Stern 2018 (arXiv:1804.04235), as `transformers.optimization.Adafactor` computes them, whose state
this shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.optimization import Adafactor


def steps_together(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` is for this optimizer: rates that depend on each weight's own size are read one by one."""
    return type(optimizer) is Adafactor and not any(group["scale_parameter"] for group in optimizer.param_groups)


@torch.no_grad()
def _step(optimizer: Adafactor) -> None:
    weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
    if any(weight.dtype != torch.float32 or weight.grad.dtype != torch.float32 for weight in weights):
        type(optimizer).step.__wrapped__(optimizer)  # casts each
        return
    for group in optimizer.param_groups:
        alike: dict[int, list[Tensor]] = {}  # by steps done, on which rates and decays depend
        for weight in group["params"]:
            if weight.grad is not None:
                _prepare(optimizer.state[weight], weight, group)
                alike.setdefault(optimizer.state[weight]["step"], []).append(weight)
        for own in alike.values():
            _step_alike(own, [optimizer.state[weight] for weight in own], group, optimizer)


# With the hooks of an optimizer's step.
step = torch.optim.Optimizer.profile_hook_step(_step)


def _prepare(state: dict[str, Any], weight: Tensor, group: dict[str, Any]) -> None:
    """The state of a weight, for the coming step."""
    gradient = weight.grad
    if not state:
        state["step"], state["RMS"] = 0, 0
        if group["beta1"] is not None:
            state["exp_avg"] = torch.zeros_like(gradient)
        if gradient.dim() >= 2:
            state["exp_avg_sq_row"] = gradient.new_zeros(gradient.shape[:-1])
            state["exp_avg_sq_col"] = gradient.new_zeros(gradient.shape[:-2] + gradient.shape[-1:])
        else:
            state["exp_avg_sq"] = torch.zeros_like(gradient)
    for name, value in state.items():
        if name.startswith("exp_avg") and (value.dtype != gradient.dtype or value.device != gradient.device):
            state[name] = value.to(gradient)
    state["step"] += 1


def _step_alike(
    weights: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any], optimizer: Adafactor
) -> None:
    for state, size in zip(states, _root_mean_squares(weights), strict=True):
        state["RMS"] = size
    rate, decay = optimizer._get_lr(group, states[0]), 1.0 - math.pow(states[0]["step"], group["decay_rate"])
    order = sorted(range(len(weights)), key=lambda number: weights[number].dim() < 2)  # matrices first
    weights, states = [weights[number] for number in order], [states[number] for number in order]
    matrices = sum(weight.dim() >= 2 for weight in weights)
    gradients = [weight.grad for weight in weights]
    squares = torch._foreach_pow(gradients, 2)
    torch._foreach_add_(squares, group["eps"][0])
    updates = []
    if matrices:
        updates += _factored(states[:matrices], squares[:matrices], decay)
    if matrices < len(weights):
        averages = [state["exp_avg_sq"] for state in states[matrices:]]
        _decay(averages, squares[matrices:], decay)
        updates += _rsqrt(averages)
    del squares
    torch._foreach_mul_(updates, gradients)
    sizes = _root_mean_squares(updates)
    if group["clip_threshold"] != 1:
        torch._foreach_div_(sizes, group["clip_threshold"])
    torch._foreach_clamp_min_(sizes, 1.0)
    torch._foreach_div_(updates, sizes)
    torch._foreach_mul_(updates, rate)
    if group["beta1"] is not None:
        averages = [state["exp_avg"] for state in states]
        torch._foreach_mul_(averages, group["beta1"])
        torch._foreach_add_(averages, updates, alpha=1 - group["beta1"])
        updates = averages
    if group["weight_decay"] != 0:
        torch._foreach_add_(weights, weights, alpha=-group["weight_decay"] * rate)
    torch._foreach_sub_(weights, updates)


def _factored(states: Sequence[dict[str, Any]], squares: Sequence[Tensor], decay: float) -> list[Tensor]:
    """One over the root of the average squares, which rows and columns stand for."""
    rows = [state["exp_avg_sq_row"] for state in states]
    columns = [state["exp_avg_sq_col"] for state in states]
    _decay(rows + columns, [one.mean(dim=-1) for one in squares] + [one.mean(dim=-2) for one in squares], decay)
    by_shape: dict[torch.Size, list[int]] = {}
    for number, row in enumerate(rows):
        by_shape.setdefault(row.shape, []).append(number)
    of_rows: list[Tensor] = list(rows)
    for numbers in by_shape.values():
        stacked = torch.stack([rows[number] for number in numbers])
        stacked = (stacked / stacked.mean(dim=-1, keepdim=True)).rsqrt_()
        for number, one in zip(numbers, stacked, strict=True):
            of_rows[number] = one
    of_columns = _rsqrt(columns)
    return [torch.mul(r.unsqueeze(-1), c.unsqueeze(-2)) for r, c in zip(of_rows, of_columns, strict=True)]


def _decay(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, values, alpha=1.0 - decay)


def _root_mean_squares(tensors: Sequence[Tensor]) -> list[Tensor]:
    norms = list(torch._foreach_norm(tensors, 2))
    torch._foreach_div_(norms, [tensor.numel() ** 0.5 for tensor in tensors])
    return norms


def _rsqrt(tensors: list[Tensor]) -> list[Tensor]:
    if hasattr(torch, "_foreach_rsqrt"):
        return list(torch._foreach_rsqrt(tensors))
    return [tensor.rsqrt() for tensor in tensors]  # torch 2.6
