"""Network files: `<layer>.<tensor>` for every tensor, e.g. `lora_unet_..._to_q.lora_down.weight`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.checkpoints.embeddings import BUNDLED
from library.checkpoints.reading import file_format, read_header, read_state_dict
from library.errors import UserError
from library.runtime.logs import LOGGER
from networks.file_names import SHOWN, named_format
from networks.fused import can_join, join, stacked
from networks.layouts import kohya_name

if TYPE_CHECKING:
    from library.types import LoraTarget

ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers notes what PEFT was configured with
Entries = dict[str, dict[str, Tensor]]  # for each layer its tensors, by what stands behind the layer's name


PREFIXES = ("lora", "oft", "lycoris")  # of layers' names, by who wrote the file and for which type
# Other names of parts: a file may count text encoders in another way than the family does.
_PARTS = {"denoiser": ("unet",), "te": ("te", "te1"), "te1": ("te1", "te"), "te2": ("te2",), "te3": ("te3", "te2")}
_NORMS = {"diff": "w_norm", "diff_b": "b_norm"}  # ComfyUI's names for differences of norms, and LyCORIS'


def names_of(target: LoraTarget) -> list[str]:
    """Every name that a layer may have in files as one layer; the family's own first."""
    own = [name for name in (target.key, target.alias) if name]
    _, _, path = target.key.removeprefix("lora_").partition("_")
    paths = [path, path.removeprefix("text_model_")]
    if len(target.modules) == 1:
        paths.append(target.modules[0].replace(".", "_"))
    own += [f"lora_{part}_{path}" for part in _PARTS.get(target.part, (target.part,)) for path in paths]
    return list(dict.fromkeys(name.replace("lora", prefix, 1) for prefix in PREFIXES for name in own))


def names_of_pieces(target: LoraTarget) -> list[tuple[str, str]]:
    """The names that the modules of a fused layer have in files that hold them one by one; empty for other layers.

    They are those of the modules, or, in OneTrainer's newer files, the layer's with a number.
    """
    if len(target.modules) == 1:
        return []
    return [
        (f"lora_unet_{path.replace('.', '_')}", f"{target.key}_{number}") for number, path in enumerate(target.modules)
    ]


def names_in_files(targets: Iterable[LoraTarget]) -> set[str]:
    """Every name that any of these layers, or a piece of one, may have in files."""
    return {name for target in targets for names in (names_of(target), *names_of_pieces(target)) for name in names}


@dataclass(frozen=True)
class NetworkFile:
    """A network file of any type. Tensors are as in the file."""

    path: Path
    entries: Entries

    def flat(self) -> dict[str, Tensor]:
        return {f"{key}.{name}": tensor for key, entry in self.entries.items() for name, tensor in entry.items()}

    def unused(self, targets: Iterable[LoraTarget]) -> list[str]:
        """The layers of the file that none of these targets is, or has as a part."""
        known = names_in_files(targets)
        return [layer for layer in self.entries if layer not in known]

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
                entry = swapped(entry) if live else entry
                if target.norm:
                    entry = {_NORMS.get(tensor, tensor): value for tensor, value in entry.items()}
                found[target.key] = entry
                continue
            named = (filter(None, map(self.entries.get, names)) for names in names_of_pieces(target))
            pieces = [next(entries, None) for entries in named]
            if any(pieces):
                found[target.key] = self._fused(target, pieces, rows(target))
        if not found:
            raise UserError(
                f"{self.path}: none of its {len(self.entries)} layers fits the {len(targets)} layers of the model that "
                f"count here; its first is {next(iter(self.entries))}, here the first is {targets[0].key}. "
                f"Was it made for another kind of model, or for another part of it?{named_format(self.entries)}"
            )
        return found

    def _fused(
        self, target: LoraTarget, pieces: Sequence[dict[str, Tensor] | None], rows: Sequence[int]
    ) -> dict[str, Tensor]:
        """Single modules as the layer that they are in files: LoRA with its ranks side by side, others `stacked`.

        Raises: UserError: a piece is of another size.
        """
        if not can_join(pieces):
            return stacked(pieces, rows)
        try:
            return join(pieces, rows, share=False)
        except UserError as error:
            raise UserError(*(f"{self.path}: {target.key}: {problem}" for problem in error.problems)) from error


def read(path: str | Path, *, keep_8_bits: bool = False) -> NetworkFile:
    """Reads a .safetensors, or a .ckpt/.pt without running code from it. Names of other programs become kohya's.

    Embeddings beside the layers are left out.

    Args: keep_8_bits: False: 8-bit floats become float32, as little can be computed in them.
    Raises: UserError: missing or broken, or its names are not ``<layer>.<tensor>``.
    """
    entries: Entries = {}
    scaled: list[str] = []  # layers whose biases have yet to be multiplied by alpha / rank
    tensors = read_state_dict(path)
    layers = {name: tensor for name, tensor in tensors.items() if not name.startswith(BUNDLED)}
    if not layers:
        raise UserError(f"{path}: holds no layer of a network.{named_format(tensors)}")
    if len(layers) < len(tensors):
        LOGGER.warning(
            "%s: its embeddings (%s*) act only where --token_string names their words",
            path,
            BUNDLED,
        )
    for name, tensor in layers.items():
        layer, dot, rest = kohya_name(name).partition(".")
        if not dot:
            shown = ", ".join(list(layers)[:SHOWN])
            raise UserError(f"{path}: holds {shown}, so it is no file of a network.{named_format(tensors)}")
        if tensor.is_floating_point() and tensor.element_size() == 1 and not keep_8_bits:
            tensor = tensor.float()
        if rest == "reshape_weight":  # ComfyUI's note of a weight's shape, which the matrices say too
            continue
        if rest == "dora_scale" and (tensor.dim() == 1 or "lora_magnitude_vector" in name):
            # PEFT has the magnitudes of rows as a vector, those of convolutions as (1, out, 1, 1).
            tensor = tensor.reshape(-1, *[1] * max(tensor.dim() - 1, 1))
        if rest == "diff_b" and ".lora_B" in name:
            scaled.append(layer)
        entries.setdefault(layer, {})[rest] = tensor
    for layer, alpha in _alphas(path, entries).items():
        entries[layer]["alpha"] = torch.tensor(alpha)
    for layer in scaled:
        entry = entries[layer]
        rank = len(entry.get("lora_down.weight", [1]))
        entry["diff_b"] = entry["diff_b"].float() * ((float(entry.get("alpha", 0)) or rank) / rank)
    return NetworkFile(Path(path), entries)


def _alphas(path: str | Path, entries: Entries) -> dict[str, float]:
    """Of layers without one, by the metadata that diffusers writes: alphas of parts, and of single layers in them."""
    lacking = [layer for layer, entry in entries.items() if "lora_down.weight" in entry and "alpha" not in entry]
    if not lacking or file_format(path) != "safetensors":
        return {}
    try:
        config = json.loads(read_header(path)[0].get(ADAPTER_METADATA, "{}"))
    except ValueError:
        return {}
    alphas: dict[str, float] = {}  # by beginnings of layers' names, those of single layers first
    for name, patterns in config.items():
        if name.endswith(".alpha_pattern") and isinstance(patterns, dict):
            part = name.removesuffix("alpha_pattern")
            # With and without the level of CLIP that transformers' newer classes do not have.
            for level in ("", "text_model."):
                alphas |= {_beginning(f"{part}{level}{path}"): value for path, value in patterns.items()}
    for name, value in config.items():
        if name.endswith(".lora_alpha"):
            alphas.setdefault(_beginning(f"{name.removesuffix('.lora_alpha')}.x").removesuffix("x."), value)
    rslora = any(value is True for name, value in config.items() if name.endswith(".use_rslora"))
    found = {}
    for layer in lacking:
        alpha = next((value for start, value in alphas.items() if f"{layer}.".startswith(start)), None)
        if isinstance(alpha, int | float):
            found[layer] = alpha * (len(entries[layer]["lora_down.weight"]) ** 0.5 if rslora else 1)
    return found


def _beginning(path: str) -> str:
    """A path in a file of diffusers as kohya's name for a layer, with the dot behind it."""
    return kohya_name(f"{path}.alpha").removesuffix("alpha")


def swapped(entry: dict[str, Tensor]) -> dict[str, Tensor]:
    """An entry whose rows are in the order of the live module, in that of files."""
    rows = [name for name in ("lora_up.weight", "dora_scale", "diff", "diff_b") if name in entry]
    return {**entry, **{name: entry[name].roll(len(entry[name]) // 2, 0) for name in rows}}
