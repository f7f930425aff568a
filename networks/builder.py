"""The contract between the training of a network and whoever makes it: a type of ours, or another's module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.options.network import DEFAULT_RANK

if TYPE_CHECKING:
    from library.types import BlockLayout, LoraTarget, Models
    from networks.files import NetworkFile
    from networks.network import TrainableNetwork


class NetworkBuilder(ABC):
    """Makes the networks of one value of --network_module.

    Common arguments: `args` as --network_args gives them; `dropout` of --network_dropout; `layout`: the family's
    blocks, for block-wise lists.
    """

    usual_dim: int = DEFAULT_RANK  # where --network_dim is not given

    @abstractmethod
    def read(self, path: str | Path) -> NetworkFile:
        """A file that these networks continue from.

        Raises: UserError: missing or broken, or of another type; the message names it.
        """

    @abstractmethod
    def create(
        self,
        targets: Sequence[LoraTarget],
        models: Models,
        *,
        dim: int,
        alpha: float | None,
        args: Mapping[str, str],
        seed: int,
        dropout: float | None = None,
        layout: BlockLayout | None = None,
    ) -> TrainableNetwork:
        """A new network on those of `targets` that `args` choose, which adds nothing yet to the model's outputs.

        The same `seed` draws the same weights. An alpha of None or 0 means the rank.

        Raises: UserError: wrong arguments, ones that leave nothing, or ones for another kind of model.
        """

    @abstractmethod
    def from_weights(
        self,
        targets: Sequence[LoraTarget],
        models: Models,
        file: NetworkFile,
        *,
        args: Mapping[str, str],
        dropout: float | None = None,
        layout: BlockLayout | None = None,
    ) -> TrainableNetwork:
        """A network with exactly the file's layers, ranks, alphas and values, as far as `targets` have them.

        Raises: UserError: nothing of the file fits, or a layer is of another size; see also `create`.
        """

    @abstractmethod
    def load(self, network: TrainableNetwork, file: NetworkFile) -> tuple[int, int, int]:
        """Copies a file's values into a network of `create`; layers that the file lacks keep theirs.

        Returns: layers loaded, layers that the file lacks, layers of the file that are not in the network.
        Raises: UserError: nothing fits, or a layer has another rank or size.
        """
