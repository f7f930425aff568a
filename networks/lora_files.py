"""Reading LoRA files of the kohya layout: `<key>.lora_down.weight`, `<key>.lora_up.weight`, `<key>.alpha`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from library.checkpoints.reading import read_state_dict
from library.errors import UserError
from networks import functional
from networks.file_names import foreign_format, named_format

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
    entries: dict[str, Entry] = {}
    strangers: list[str] = []
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, rest = name.partition(".")
        groups.setdefault(key, {})[rest] = tensor
    for key, parts in groups.items():
        down, up, alpha = (parts.pop(name, None) for name in ("lora_down.weight", "lora_up.weight", "alpha"))
        strangers += [f"{key}.{rest}" for rest in parts]
        if down is None or up is None:
            strangers += [f"{key}.lora_{side}.weight" for side, t in (("down", down), ("up", up)) if t is not None]
            continue
        if down.dim() not in (2, 4) or up.dim() not in (2, 4) or up.shape[1] != down.shape[0]:
            raise UserError(f"{path}: {key}: down {tuple(down.shape)} and up {tuple(up.shape)} do not belong together")
        stored = functional.effective_alpha(None if alpha is None else float(alpha), down.shape[0])
        entries[key] = Entry(down, up, stored)
    if strangers or not entries:
        shown = ", ".join(strangers[:3] or list(tensors)[:3]) or "nothing"
        foreign = foreign_format(tensors)
        told = f": this is {foreign[0]}, which is not available here yet; {foreign[1]}" if foreign else ""
        raise UserError(
            f"{path}: holds {shown}, which is not LoRA of this kind (expected *.lora_down.weight, *.lora_up.weight, "
            f"*.alpha){told}"
        )
    return LoraFile(path, entries)
