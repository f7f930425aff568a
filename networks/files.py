"""Network files: `<layer>.<tensor>` for every tensor, e.g. `lora_unet_..._to_q.lora_down.weight`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.checkpoints.reading import file_format, read_header, read_state_dict
from library.errors import UserError
from networks.file_names import named_format
from networks.layouts import kohya_name

if TYPE_CHECKING:
    from library.types import LoraTarget

ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers notes what PEFT was configured with
Entries = dict[str, dict[str, Tensor]]  # for each layer its tensors, by what stands behind the layer's name


PREFIXES = ("lora", "oft", "lycoris")  # of layers' names, by who wrote the file and for which type
# Other names of parts: a file may count text encoders in another way than the family does.
_PARTS = {"denoiser": ("unet",), "te": ("te", "te1"), "te1": ("te1", "te"), "te2": ("te2",), "te3": ("te3", "te2")}


def names_of(target: LoraTarget) -> list[str]:
    """Every name that a layer may have in files as one layer; the family's own first."""
    own = [name for name in (target.key, target.alias) if name]
    _, _, path = target.key.removeprefix("lora_").partition("_")
    paths = [path, path.removeprefix("text_model_")]
    if len(target.modules) == 1:
        paths.append(target.modules[0].replace(".", "_"))
    own += [f"lora_{part}_{path}" for part in _PARTS.get(target.part, (target.part,)) for path in paths]
    return list(dict.fromkeys(name.replace("lora", prefix, 1) for prefix in PREFIXES for name in own))


def names_of_pieces(target: LoraTarget) -> list[str]:
    """The names that the modules of a fused layer have in files that hold them one by one; empty for other layers."""
    fused = len(target.modules) > 1
    return [f"lora_unet_{path.replace('.', '_')}" for path in target.modules] if fused else []


def names_in_files(targets: Iterable[LoraTarget]) -> set[str]:
    """Every name that any of these layers, or a piece of one, may have in files."""
    return {name for target in targets for name in (*names_of(target), *names_of_pieces(target))}


@dataclass(frozen=True)
class NetworkFile:
    """A network file of any type. Tensors are as in the file."""

    path: Path
    entries: Entries

    def flat(self) -> dict[str, Tensor]:
        return {f"{key}.{name}": tensor for key, entry in self.entries.items() for name, tensor in entry.items()}

    def matching(self, targets: Iterable[LoraTarget], rows: Callable[[LoraTarget], Sequence[int]]) -> Entries:
        """The entries that have a target here, by the targets' keys and in their order. Raises: UserError: none has.

        Args: rows: gives the numbers of output rows of the modules of a target.
        """
        targets = list(targets)
        found: Entries = {}
        for target in targets:
            name = next((name for name in names_of(target) if name in self.entries), None)
            if name is not None:
                entry = self.entries[name]
                live = name not in (target.key, target.alias) and target.swap_halves
                found[target.key] = _swapped(entry) if live else entry
                continue
            pieces = [self.entries.get(name) for name in names_of_pieces(target)]
            if any(pieces):
                found[target.key] = self._fused(target, pieces, rows(target))
        if not found:
            raise UserError(
                f"{self.path}: none of its {len(self.entries)} layers fits the {len(targets)} layers that it could "
                f"have here; its first is {next(iter(self.entries))}, here the first is {targets[0].key}. "
                "Was it made for another kind of model, or for a part that is not there or not trained?"
                f"{named_format(self.entries)}"
            )
        return found

    def _fused(
        self, target: LoraTarget, pieces: Sequence[dict[str, Tensor] | None], rows: Sequence[int]
    ) -> dict[str, Tensor]:
        """LoRA of single modules as that of the layer that they are in files: with its ranks side by side.

        Raises: UserError: a piece is no LoRA, and so cannot be put together with others.
        """
        downs, ups = [], []
        for piece, module, count in zip(pieces, target.modules, rows, strict=True):
            if piece is None:
                ups.append(torch.zeros(count, 0))
                continue
            if piece.keys() - {"alpha"} != {"lora_down.weight", "lora_up.weight"}:
                raise UserError(f"{self.path}: {module}: only LoRA can be a part of the layer {target.key}")
            down, up = (piece[f"lora_{side}.weight"].float() for side in ("down", "up"))
            alpha = float(piece.get("alpha", 0))
            downs.append(down)
            ups.append(up * (alpha / len(down) if alpha else 1.0))
        down = torch.cat(downs)
        return {
            "lora_down.weight": down,
            "lora_up.weight": torch.block_diag(*ups),
            "alpha": torch.tensor(float(len(down))),
        }


def read(path: str | Path) -> NetworkFile:
    """Reads a .safetensors, or a .ckpt/.pt without running code from it. Names of other programs become kohya's.

    Raises: UserError: missing or broken, or its names are not ``<layer>.<tensor>``.
    """
    entries: Entries = {}
    tensors = read_state_dict(path)
    for name, tensor in tensors.items():
        layer, dot, rest = kohya_name(name).partition(".")
        if not dot:
            raise UserError(f"{path}: holds {name}, so it is no file of a network.{named_format(tensors)}")
        if rest == "dora_scale" and tensor.dim() == 1:
            tensor = tensor[:, None]  # PEFT has the magnitudes of rows as a vector
        entries.setdefault(layer, {})[rest] = tensor
    for layer, alpha in _alphas(path, entries).items():
        entries[layer]["alpha"] = torch.tensor(alpha)
    return NetworkFile(Path(path), entries)


def _alphas(path: str | Path, entries: Entries) -> dict[str, float]:
    """Of layers without one, by the metadata that diffusers writes: alphas of parts, and of single layers."""
    lacking = [layer for layer, entry in entries.items() if "lora_down.weight" in entry and "alpha" not in entry]
    if not lacking or file_format(path) != "safetensors":
        return {}
    try:
        config = json.loads(read_header(path)[0].get(ADAPTER_METADATA, "{}"))
    except ValueError:
        return {}
    by_part = {
        kohya_name(f"{name.removesuffix('.lora_alpha')}.x.alpha").removesuffix("x.alpha"): float(value)
        for name, value in config.items()
        if name.endswith(".lora_alpha") and isinstance(value, (int, float))
    }
    rslora = any(value is True for name, value in config.items() if name.endswith(".use_rslora"))
    found = {}
    for layer in lacking:
        alpha = next((value for part, value in by_part.items() if layer.startswith(part)), None)
        if alpha is not None:
            found[layer] = alpha * (len(entries[layer]["lora_down.weight"]) ** 0.5 if rslora else 1)
    return found


def _swapped(entry: dict[str, Tensor]) -> dict[str, Tensor]:
    """An entry whose rows are in the order of the live module, in that of files."""
    rows = [name for name in ("lora_up.weight", "dora_scale", "diff", "diff_b") if name in entry]
    return {**entry, **{name: entry[name].roll(len(entry[name]) // 2, 0) for name in rows}}
