"""Which moments of the diffusion a training step looks at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from library.errors import UserError
from library.objectives.ddpm import NUM_TIMESTEPS


class TimestepRange(NamedTuple):
    """Integers from `low` up to, not including, `high`."""

    low: int
    high: int


def timestep_range(minimum: int | None, maximum: int | None) -> TimestepRange:
    """The range meant by --min_timestep and --max_timestep; two equal values mean that one timestep.

    Raises: UserError: a value outside 0..1000, or the minimum above the maximum.
    """
    low = 0 if minimum is None else minimum
    high = NUM_TIMESTEPS if maximum is None else maximum
    if not 0 <= low < NUM_TIMESTEPS:
        raise UserError(f"--min_timestep: must be from 0 to {NUM_TIMESTEPS - 1}, got {low}")
    if not 0 <= high <= NUM_TIMESTEPS:
        raise UserError(f"--max_timestep: must be from 0 to {NUM_TIMESTEPS}, got {high}")
    if low > high:
        raise UserError(f"--min_timestep {low} is above --max_timestep {high}: no timestep is left to train on")
    return TimestepRange(low, max(high, low + 1))


def uniform(count: int, span: TimestepRange, generator: torch.Generator) -> Tensor:
    """`count` timesteps, uniform in the range, int64 (count,), on the generator's device."""
    return torch.randint(span.low, span.high, (count,), generator=generator, device=generator.device)


def validation_timesteps(span: TimestepRange) -> list[int]:
    """Four timesteps that divide the range into five equal parts; 200, 400, 600, 800 for the whole range."""
    return [span.low + (span.high - span.low) * part // 5 for part in range(1, 5)]
