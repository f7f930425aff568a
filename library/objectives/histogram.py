"""Which timesteps an objective draws, and how it weighs them: counted, by the functions that training calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from library.objectives.ddpm import NUM_TIMESTEPS
from library.objectives.objective import Objective

DRAWS = 1_000_000  # of which one in a thousand falls into a bin is off by 3 % at most, nearly always
_SEED = 1


@dataclass(frozen=True)
class Bin:
    """Draws from `start` up to, not including, `end`; the last bin holds 1000, pure noise, too."""

    start: float
    end: float
    share: float  # of all draws, 0 to 1
    weight: float | None  # mean factor on the loss of these draws; None: there are none
    weighed: float  # share of the sum of all draws' factors, 0 to 1


def histogram(objective: Objective, size: tuple[int, int], bins: int, offset: float = 0.0) -> list[Bin]:
    """Bins of equal width over all timesteps, from 0 to 1000.

    Args:
        size: of the latents, (h, w); one way of drawing depends on it.
        offset: see `Batch.timestep_offsets`.
    """
    generator = torch.Generator().manual_seed(_SEED)
    offsets = torch.full((DRAWS,), offset) if offset else None
    timesteps = objective.draw_timesteps(DRAWS, size, generator, offsets)
    weights = torch.as_tensor(objective.weights(timesteps)).double().expand(DRAWS)
    place = (timesteps.double() * bins / NUM_TIMESTEPS).long().clamp(max=bins - 1)
    counts = torch.bincount(place, minlength=bins)
    sums = torch.bincount(place, weights, minlength=bins)
    width, total = NUM_TIMESTEPS / bins, float(sums.sum())
    return [
        Bin(number * width, (number + 1) * width, count / DRAWS, own / count if count else None, own / total)
        for number, (count, own) in enumerate(zip(counts.tolist(), sums.tolist(), strict=True))
    ]
