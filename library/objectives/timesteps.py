"""Timesteps of training and validation: their range, and uniform sampling."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from library.objectives.ddpm import NUM_TIMESTEPS


class TimestepRange(NamedTuple):
    """Integers from `low` up to, not including, `high`."""

    low: int
    high: int


def timestep_range(minimum: int | None, maximum: int | None) -> TimestepRange:
    """The range of --min_timestep and --max_timestep; None is the end of the whole range, 0 or 1000."""
    return TimestepRange(0 if minimum is None else minimum, NUM_TIMESTEPS if maximum is None else maximum)


def uniform(count: int, span: TimestepRange, generator: torch.Generator) -> Tensor:
    """`count` timesteps, uniform in the range, int64 (count,), on the generator's device."""
    return torch.randint(span.low, span.high, (count,), generator=generator, device=generator.device)


def validation_timesteps(span: TimestepRange, count: int = 4) -> list[int]:
    """`count` timesteps that divide the range into equal parts; 200, 400, 600, 800 for four in the whole range."""
    return [span.low + (span.high - span.low) * part // (count + 1) for part in range(1, count + 1)]
