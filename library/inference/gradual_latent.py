"""Gradual Latent: drawing begins with small latents, which grow while steps are made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from library.types import FamilyTraits

TIMESTEPS = 650  # where a prompt asks for Gradual Latent and nothing says when
SAMPLERS = ("euler_a", "euler")  # those with which it works; "k_" before them changes nothing
_LAST = 1000  # timestep
_UNIT = 8  # sides of latents on their way are multiples of it

Sides = tuple[int, int]  # height and width of latents


@dataclass(frozen=True)
class GradualLatent:
    """How latents grow."""

    timesteps: int | None = None  # they grow below this timestep; None: Gradual Latent is off
    ratio: float = 0.5  # of the sides at the beginning, above 0, at most 1
    ratio_step: float = 0.125  # that each enlargement adds
    every_n_steps: int = 3
    s_noise: float = 1.0  # strength of the noise that enlarged latents get
    # Of the unsharp mask: size, sigma, strength, and whether it is laid over what the step gives (1) or over what it
    # begins with (0); None: there is none.
    unsharp: tuple[float, ...] | None = None

    def switched_on(self) -> GradualLatent:
        """The same, with the usual timestep where there is none."""
        return self if self.timesteps is not None else replace(self, timesteps=TIMESTEPS)

    def problems(self, traits: FamilyTraits, sampler: str) -> Iterator[str]:
        """One line for each thing with which no image of the family can be made."""
        if self.timesteps is None:
            return
        if traits.objective == "flow":
            yield f"Gradual Latent (gradual_latent_timesteps) is not for {traits.label}; leave it out"
        elif sampler.removeprefix("k_") not in SAMPLERS:
            yield f"Gradual Latent works with the samplers {' and '.join(SAMPLERS)}, not with {sampler}"
        if not 0 <= self.timesteps <= _LAST:
            yield f"Gradual Latent's timesteps must be from 0 to {_LAST}, got {self.timesteps}"
        if not 0 < self.ratio <= 1:
            yield f"Gradual Latent's ratio must be above 0 and at most 1, got {self.ratio}"
        if not 0 < self.ratio_step <= 1:
            yield f"Gradual Latent's ratio_step must be above 0 and at most 1, got {self.ratio_step}"
        if self.every_n_steps < 1:
            yield f"Gradual Latent's every_n_steps must be at least 1, got {self.every_n_steps}"
        if self.s_noise < 0:
            yield f"Gradual Latent's s_noise must be at least 0, got {self.s_noise}"
        problem = self._unsharp_problem()
        if problem:
            yield f"Gradual Latent's unsharp_params: {problem}, got {','.join(f'{v:g}' for v in self.unsharp or ())}"

    def _unsharp_problem(self) -> str | None:
        values = self.unsharp
        if values is None:
            return None
        if not 3 <= len(values) <= 4:
            return "needs size, sigma, strength and, if need be, 1 or 0, as in 3,0.5,0.5,1"
        if values[0] % 2 != 1 or not 1 <= values[0] <= 99:
            return "the size, which comes first, must be an odd number from 1 to 99"
        if values[1] <= 0:
            return "sigma, which comes second, must be above 0"
        return None if len(values) == 3 or values[3] in (0, 1) else "the last must be 1 or 0"

    def smallest(self, full: Sides) -> Sides:
        """The size at the beginning."""
        height, width = (max(1, int(side * self.ratio)) for side in full)
        return height, width

    def growth(self, timesteps: list[float], full: Sides) -> list[Sides | None]:
        """For each step the size that it enlarges latents to; None: it leaves their size. The last size is `full`."""
        sizes: list[Sides | None] = []
        ratio, size, since = self.ratio, self.smallest(full), self.every_n_steps
        for timestep in timesteps:
            grows = timestep < (self.timesteps or 0) and ratio < 1 and since >= self.every_n_steps
            if grows:
                ratio, since = min(ratio + self.ratio_step, 1.0), 0
                size = full if ratio == 1 else _on_the_way(size, ratio, full)
            sizes.append(size if grows else None)
            since += 1
        if size != full and sizes:
            LOGGER.warning(
                "Gradual Latent: %d steps are too few to reach the full size in parts of %g, one every %d steps from "
                "timestep %s on; the last step enlarges the rest",
                *(len(timesteps), self.ratio_step, self.every_n_steps, self.timesteps),
            )
            sizes[-1] = full
        return sizes


def _on_the_way(before: Sides, ratio: float, full: Sides) -> Sides:
    height, width = (max(old, int(side * ratio) // _UNIT * _UNIT) for old, side in zip(before, full, strict=True))
    return height, width
