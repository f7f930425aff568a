"""Reading LoRA files of the kohya layout: `<key>.lora_down.weight`, `<key>.lora_up.weight`, `<key>.alpha`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from library.checkpoints.reading import read_state_dict
from library.errors import UserError
from networks import functional
from networks.file_names import named_format, require_lora_names

if TYPE_CHECKING:
    from collections.abc import Iterable

    from library.types import LoraTarget


@dataclass(frozen=True)
class Entry:
    """The tensors of one key. Shapes as in the file; `alpha` is the rank where the file has none."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def change(self) -> Tensor:
        """The weight change at multiplier 1, float32."""
        return functional.delta(self.down.float(), self.up.float()) * (self.alpha / self.rank)


@dataclass(frozen=True)
class LoraFile:
    path: Path
    entries: dict[str, Entry]

    def matching(self, targets: Iterable[LoraTarget]) -> dict[str, Entry]:
        """The entries that have a target here, by the targets' keys and in their order. Raises: UserError: none has."""
        targets = list(targets)
        found: dict[str, Entry] = {}
        for target in targets:
            name = next((name for name in (target.key, target.alias) if name in self.entries), None)
            if name is not None:
                found[target.key] = self.entries[name]
        if not found:
            raise UserError(
                f"{self.path}: none of its {len(self.entries)} layers fits the {len(targets)} layers that are trained "
                f"here; its first is {next(iter(self.entries))}, here the first is {targets[0].key}. "
                f"Was it made for another kind of model, or for a part that is not trained?{named_format(self.entries)}"
            )
        return found


def read(path: str | Path) -> LoraFile:
    """Reads a .safetensors, or a .ckpt/.pt without running code from it.

    Raises: UserError: missing, broken or not such a file; the message names it.
    """
    path = Path(path)
    tensors = read_state_dict(path)
    require_lora_names(path, tensors)
    entries: dict[str, Entry] = {}
    for key in dict.fromkeys(name.partition(".")[0] for name in tensors):
        down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
        alpha = tensors.get(f"{key}.alpha")
        if down.dim() not in (2, 4) or up.dim() not in (2, 4) or up.shape[1] != down.shape[0]:
            raise UserError(f"{path}: {key}: down {tuple(down.shape)} and up {tuple(up.shape)} do not belong together")
        stored = functional.effective_alpha(None if alpha is None else float(alpha), down.shape[0])
        entries[key] = Entry(down, up, stored)
    return LoraFile(path, entries)
