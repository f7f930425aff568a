"""Network files: `<layer>.<tensor>` for every tensor, e.g. `lora_unet_..._to_q.lora_down.weight`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from library.checkpoints.reading import read_state_dict
from library.errors import UserError
from networks.file_names import named_format

if TYPE_CHECKING:
    from library.types import LoraTarget

Entries = dict[str, dict[str, Tensor]]  # for each layer its tensors, by what stands behind the layer's name


PREFIXES = ("lora", "oft", "lycoris")  # of layers' names, by who wrote the file and for which type


def names_of(target: LoraTarget) -> list[str]:
    """Every name that a layer may have in files."""
    own = [name for name in (target.key, target.alias) if name]
    return [name.replace("lora", prefix, 1) for prefix in PREFIXES for name in own]


def names_in_files(targets: Iterable[LoraTarget]) -> set[str]:
    """Every name that any of these layers may have in files."""
    return {name for target in targets for name in names_of(target)}


@dataclass(frozen=True)
class NetworkFile:
    """A network file of any type. Tensors are as in the file."""

    path: Path
    entries: Entries

    def flat(self) -> dict[str, Tensor]:
        return {f"{key}.{name}": tensor for key, entry in self.entries.items() for name, tensor in entry.items()}

    def matching(self, targets: Iterable[LoraTarget]) -> Entries:
        """The entries that have a target here, by the targets' keys and in their order. Raises: UserError: none has."""
        targets = list(targets)
        found: Entries = {}
        for target in targets:
            name = next((name for name in names_of(target) if name in self.entries), None)
            if name is not None:
                found[target.key] = self.entries[name]
        if not found:
            raise UserError(
                f"{self.path}: none of its {len(self.entries)} layers fits the {len(targets)} layers that are trained "
                f"here; its first is {next(iter(self.entries))}, here the first is {targets[0].key}. "
                f"Was it made for another kind of model, or for a part that is not trained?{named_format(self.entries)}"
            )
        return found


def read(path: str | Path) -> NetworkFile:
    """Reads a .safetensors, or a .ckpt/.pt without running code from it.

    Raises: UserError: missing or broken, or its names are not ``<layer>.<tensor>``.
    """
    entries: Entries = {}
    tensors = read_state_dict(path)
    for name, tensor in tensors.items():
        layer, dot, rest = name.partition(".")
        if not dot:
            raise UserError(f"{path}: holds {name}, so it is no file of a network.{named_format(tensors)}")
        entries.setdefault(layer, {})[rest] = tensor
    return NetworkFile(Path(path), entries)
