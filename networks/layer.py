"""The contract of adapter layers: what a type of network defines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class AdapterLayer(nn.Module, ABC):
    """One entry of a network file, on one module or on several that are one fused layer in files.

    Its state_dict keys are what stands behind the entry's name in the file. `alpha` is a 0-dim buffer. The class that a
    `NetworkType` names defines `rebuild` and `weight_change`, too; it may make layers of other classes.
    """

    multiplier: float = 1.0
    # What becomes of a module's output; it gets this, and what gives the adapted one. None: that takes its place.
    within: Callable[[Tensor, Callable[[], Tensor]], Tensor] | None = None
    rows: list[int]  # output rows of each module
    reads_live = True  # whether `adapt` may read weights of the modules, or call them
    shares_input = False  # whether `adapt` may be given the input in the dtype that autocast computes in
    copies: tuple[Tensor, ...] | None = None  # of what `copied_weights` names, while there are some

    def rows_of(self, index: int) -> slice:
        """The output rows of the `index`-th module among those of all."""
        start = sum(self.rows[:index])
        return slice(start, start + self.rows[index])

    @classmethod
    def build(cls, modules: Sequence[nn.Module], rank: int, alpha: float | None, args: Any) -> AdapterLayer:
        """A layer on `modules`, whose values `init_weights` or `load` gives.

        Args: alpha: None or 0 mean the rank; args: of the type, see `NetworkType.args`.
        """
        return cls(modules, rank, alpha, args)

    @classmethod
    def rebuild(cls, modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], args: Any) -> AdapterLayer:
        """A layer with the rank, alpha and values of a file's entry. Raises: UserError: it does not fit the modules."""
        raise NotImplementedError

    @property
    @abstractmethod
    def rank(self) -> int:
        """The rank, or what stands in its place in the type."""

    @abstractmethod
    def init_weights(self, rng: torch.Generator) -> None:
        """Draws the first values, with which the layer changes nothing yet."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over the values of a file's entry. Raises: UserError: another rank, or a layer of another size."""

    @classmethod
    def weight_change(cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor]) -> Tensor:
        """What a file's entry adds to a weight at multiplier 1, float32.

        Args:
            shape: of the weight: rows over all modules of the layer, in the file's order, (sum of out, in, ...).
            weight: gives the weight in float32, for types whose change depends on it.
        Raises: UserError: the entry does not fit that weight.
        """
        raise NotImplementedError

    @classmethod
    def merged_change(
        cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor], multiplier: float
    ) -> Tensor:
        """What a file's entry adds to a weight at a multiplier, float32; 0 at 0. See `weight_change`."""
        change = cls.weight_change(tensors, shape, weight)
        return change if multiplier == 1 else change * multiplier

    @classmethod
    def bias_change(cls, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """What a file's entry adds to a bias at multiplier 1, float32; None: nothing."""
        return None

    @abstractmethod
    def adapt(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        """The output that the `index`-th module of the layer shall have for input `x`, instead of `output`."""

    def instead(self, index: int, x: Tensor) -> Tensor | None:
        """The same, where the layer makes it without the live module's output, which then is not computed; else None.

        Only in training, when one network at most acts on a module.
        """
        return None

    def adapt_into(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        """`adapt`, for callers that need `output` no longer: it may be overwritten."""
        return self.adapt(index, x, output)

    def copied_weights(self) -> list[tuple[Tensor, Sequence[int]]]:
        """The weights of which `adapt` takes `copies` in another dtype, each with the rows of the pieces it takes."""
        return []

    def before_step(self) -> None:
        """Called before each optimizer step, when the gradients are as the step sees them; never waits."""

    @abstractmethod
    def limit_norm(self, limit: float) -> None:
        """Scales the trained tensors so that the norm of the weight change is at most `limit`; never waits."""

    def trained_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def fast_parameters(self) -> list[nn.Parameter]:
        """The parameters whose learning rate LoRA+ raises (arXiv:2402.12354)."""
        return []

    def file_state(self) -> dict[str, Tensor]:
        """The layer's entry in files."""
        return self.state_dict()
