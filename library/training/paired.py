"""Losses that are measured again and again under the same conditions, and what their differences say.

Every point at a held-out image has its own noise and timestep, which never change. So two measurements differ by the
weights alone, point by point, and the noise that both share falls out of their difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Difference(NamedTuple):
    """A mean difference and its standard error, infinite where there is but one point."""

    mean: float
    error: float


def difference(now: Tensor, before: Tensor, strata: Tensor) -> Difference:
    """The mean of ``now - before`` over all points, and its standard error.

    With n points, of which n_h lie in stratum h, where their differences have the variance s_h² (divisor n_h - 1), the
    error is ``sqrt(sum_h (n_h / n)² s_h² / n_h)``: that the strata differ among themselves is no error, since each has
    its fixed share. Neighbouring strata, 0 and 1, 2 and 3, ..., are joined until each has two points.

    Args:
        now, before: losses, (L,), of the same points.
        strata: the number of each point's stratum, (L,), int64, at least 0.
    Source: Cochran, Sampling Techniques, 3rd edition, sections 5.4 and 5A.12, for samples that are small beside what
        they stand for.
    """
    differences = now.double() - before.double()
    count = len(differences)
    if count == 1:
        return Difference(float(differences), math.inf)
    while (torch.bincount(strata)[strata] < 2).any():
        strata = strata // 2
    total = 0.0
    for stratum in strata.unique().tolist():
        own = differences[strata == stratum]
        total += len(own) * float(own.var())
    return Difference(float(differences.mean()), math.sqrt(total) / count)


class Verdict(NamedTuple):
    """What a measurement says."""

    lowest: bool  # whether its mean is the lowest since the start
    change: Difference  # from the best one before it


class Comparison:
    """Where a run stands: the losses at its start, the best ones since, and how long ago that was.

    A measurement is better where it is lower than the best one by more than the standard error of their paired
    difference. What lies within it may be an accident of these points, and does not keep a run going.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.base: Tensor | None = None  # (L,), float64
        self.best: Tensor | None = None  # the base, until something is better
        self.points = ""  # what distinguishes these points from others
        self.lowest = math.inf  # mean loss since the start
        self.latest = math.inf
        self.since = 0  # measurements without a better one

    def begin(self, losses: Tensor, points: str) -> None:
        """Takes what is measured, (L,), as the base. Args: points: differs where losses cannot be compared."""
        self.restart()
        self.base = self.best = losses.double()
        self.points, self.latest = points, float(losses.mean())

    def update(self, losses: Tensor, strata: Tensor) -> Verdict:
        """Takes a measurement, (L,). Args: as of `difference`."""
        losses = losses.double()
        self.latest = float(losses.mean())
        change = difference(losses, self.best, strata)
        better = change.mean < 0 and (change.mean < -change.error or len(losses) == 1)
        self.best, self.since = (losses, 0) if better else (self.best, self.since + 1)
        lowest = self.latest < self.lowest
        self.lowest = min(self.lowest, self.latest)
        return Verdict(lowest, change)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """States of earlier versions, whose points were others, say nothing of these."""
        self.restart()
        if vars(self).keys() <= state.keys():
            vars(self).update({name: state[name] for name in vars(self)})
