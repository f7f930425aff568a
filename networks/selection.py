"""Which layers of a model a network adapts, and with which ranks, alphas and learning rates. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from networks.arguments import ArgumentGroup

if TYPE_CHECKING:
    from library.types import LoraTarget


@dataclass(frozen=True)
class TargetLayer:
    """A layer that may be adapted."""

    target: LoraTarget
    kernel: bool = False  # whether it is a convolution with a kernel larger than 1 x 1
    path: str = ""  # of its module, in the original model where files have that structure
    classes: tuple[tuple[str, str], ...] = ()  # (path, class name) of the modules that contain it, the outermost first


@dataclass(frozen=True)
class Choice:
    """What a layer gets. `overrides`: --network_args for this layer alone."""

    rank: int
    alpha: float | None
    overrides: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection(ArgumentGroup):
    """The choice of layers. Of several patterns, the first that is found in a layer's name in files counts."""

    reg_dims: tuple[tuple[re.Pattern[str], int], ...] = ()  # network_reg_dims
    reg_lrs: tuple[tuple[re.Pattern[str], float], ...] = ()  # network_reg_lrs
    verbose: bool = False  # whether every layer's rank is listed

    def check_targets(self, targets: Sequence[LoraTarget], module: str) -> None:
        """Raises: UserError: the arguments of `module` are for another model than the one that has `targets`."""

    def check_rank(self, dim: int, module: str) -> None:
        """Raises: UserError: the arguments of `module` do not go with this --network_dim."""

    def choose(self, layer: TargetLayer, dim: int, alpha: float | None) -> Choice | None:
        """What one layer gets, or None where it gets no adapter. Args: of --network_dim and --network_alpha."""
        raise NotImplementedError

    def lr_factor(self, target: LoraTarget) -> float | None:
        """What a layer's learning rate is multiplied by for its block; None where blocks have no rates."""
        return None

    def own_dim(self, key: str) -> int | None:
        """The rank that `network_reg_dims` gives a layer; None where no pattern is found."""
        return next((dim for pattern, dim in self.reg_dims if pattern.search(key)), None)

    def own_lr(self, key: str) -> tuple[int, float] | None:
        """Which entry of `network_reg_lrs` counts for a layer, from 1, and its rate; None where none does."""
        found = ((number, lr) for number, (pattern, lr) in enumerate(self.reg_lrs, 1) if pattern.search(key))
        return next(found, None)
