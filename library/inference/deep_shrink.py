"""Deep Shrink: the features of a U-Net are made smaller on their way down while there is much noise, and large again on
their way up, so that what is drawn large has the composition of what is drawn small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.types import FamilyTraits

DEPTH = 3  # where a prompt asks for Deep Shrink and nothing says where
_LAST = 1000  # timestep


@dataclass(frozen=True)
class DeepShrink:
    """Before which input block of the U-Net features are made smaller, and when. The input convolution is block 0."""

    depth_1: int | None = None  # None: Deep Shrink is off
    timesteps_1: int = 650  # acts from the start to this timestep
    depth_2: int | None = None  # a second place, from where the first ends; None: there is none
    timesteps_2: int = 650  # until this timestep
    ratio: float = 0.5  # of the sides, above 0, at most 1

    def switched_on(self) -> DeepShrink:
        """The same, with the usual depth where there is none."""
        return self if self.depth_1 is not None else replace(self, depth_1=DEPTH)

    def depth_at(self, timestep: float) -> int | None:
        """The input block that acts at a timestep; None: none does."""
        if self.depth_1 is None:
            return None
        if timestep >= self.timesteps_1:
            return self.depth_1
        return self.depth_2 if timestep >= self.timesteps_2 else None

    def problems(self, traits: FamilyTraits) -> Iterator[str]:
        """One line for each thing with which no image of the family can be made."""
        if self.depth_1 is None:
            return
        blocks = traits.block_layout
        if blocks is None:
            yield f"Deep Shrink (ds_depth_1) needs a U-Net, and {traits.label} has none; leave it out"
            return
        for name in ("depth_1", "depth_2"):
            depth = getattr(self, name)
            if depth is not None and not 0 <= depth < blocks.down:
                yield f"Deep Shrink's ds_{name} must be from 0 to {blocks.down - 1} with {traits.label}, got {depth}"
        for name in ("timesteps_1", "timesteps_2"):
            if not 0 <= getattr(self, name) <= _LAST:
                yield f"Deep Shrink's ds_{name} must be from 0 to {_LAST}, got {getattr(self, name)}"
        if not 0 < self.ratio <= 1:
            yield f"Deep Shrink's ds_ratio must be above 0 and at most 1, got {self.ratio}"
