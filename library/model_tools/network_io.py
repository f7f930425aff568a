"""Reads and writes the network files that tools work on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.checkpoints.metadata import finalise
from library.checkpoints.reading import read_metadata, read_names, read_state_dict
from library.checkpoints.writing import write_safetensors, write_torch
from library.errors import UserError
from library.model_tools.output import require_finite, require_room
from library.runtime.files import reason
from networks.file_names import require_types
from networks.files import Entries, read, warn_of_words
from networks.fused import ALPHA
from networks.layers.locon import DOWN, MID, UP, LoconLayer
from networks.layouts import kohya_name
from networks.registry import TYPES, type_of
from networks.spec import NetworkType


@dataclass(frozen=True)
class Source:
    """A network file. Tensors are as in the file, under kohya's names; `names` has the file's own by kohya's."""

    path: Path
    entries: Entries
    names: Mapping[str, str]
    metadata: dict[str, str]


def read_network(path: str | Path, types: Sequence[NetworkType] = TYPES) -> Source:
    """Reads a file of these types, in any layout that is known. Its header is looked at before its weights are read.

    Raises: UserError: missing, broken, no network or one of another type, or with values that are no numbers.
    """
    path = Path(path)
    names = read_names(path)
    if names is not None:
        require_types(path, names)
    file = read(path, keep_8_bits=True)
    warn_of_words(file)
    require_types(path, file.flat())
    for layer, entry in file.entries.items():
        if not any(kind.reads(frozenset(entry)) for kind in types):
            label = getattr(type_of(entry), "label", "unknown")
            labels = ", ".join(dict.fromkeys(kind.label for kind in types))
            raise UserError(f"{path}: {layer} is {label}; only {labels} can be used here")
    for name, tensor in file.flat().items():
        require_finite(f"{path}: {name}", tensor)
    own = read_state_dict(path) if names is None else names
    return Source(path, file.entries, {kohya_name(name): name for name in own}, read_metadata(path))


@contextmanager
def named(layer: str) -> Iterator[None]:
    """Problems inside begin with the layer's name."""
    try:
        yield
    except UserError as error:
        raise UserError(*(f"{layer}: {problem}" for problem in error.problems), hint=error.hint) from error


def scale_of(entry: Mapping[str, Tensor]) -> float:
    """Alpha / rank of an entry with LoRA matrices; 1 without alpha."""
    return LoconLayer.scale_of(entry)


def without_core(entry: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An entry without a core tensor: in Tucker form, core and down matrix become a down matrix with a kernel."""
    if MID not in entry:
        return dict(entry)
    down = torch.einsum("rskl,si->rikl", entry[MID].float(), entry[DOWN].flatten(1).float())
    return {name: tensor for name, tensor in entry.items() if name != MID} | {DOWN: down}


def folded(entry: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoRA without alpha: its scale is in both matrices, in up as a power of two. Dtypes stay."""
    scale = scale_of(entry)
    upper = 2.0 ** round(math.log2(abs(scale)) / 2)
    factors = {UP: upper, DOWN: scale / upper}
    found = {name: tensor for name, tensor in entry.items() if name != ALPHA}
    if scale != 1:
        found |= {name: (entry[name].float() * factor).to(entry[name].dtype) for name, factor in factors.items()}
    return found


def in_own_names(entries: Entries, sources: Iterable[Source]) -> dict[str, Tensor]:
    """Tensors under the names that the sources have for them; those of new layers keep kohya's.

    Where no source has a name for a layer's alpha, its layout has none: the scale goes into the matrices.
    """
    names: dict[str, str] = {}
    for source in sources:
        names = {**source.names, **names}
    known = {name.partition(".")[0] for name in names}
    tensors = {}
    for layer, entry in entries.items():
        if layer in known and f"{layer}.{ALPHA}" not in names and DOWN in entry:
            entry = folded(entry)
        for name, tensor in entry.items():
            tensors[names.get(f"{layer}.{name}", f"{layer}.{name}")] = tensor
    return tensors


def write_network(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None
) -> None:
    """Writes a .safetensors file with its hashes, or a .ckpt/.pt, which has no metadata.

    An earlier file is replaced when the new one is whole.

    Args: dtype: of every tensor, alpha too; None: as they are.
    Raises: UserError: a value is too large for the dtype, or the file cannot be written.
    """
    path = Path(path)
    cast = {}
    for name, tensor in tensors.items():
        cast[name] = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        require_finite(f"{path}: {name}", cast[name])
    require_room(path, sum(tensor.nbytes for tensor in cast.values()))
    try:
        if path.suffix.lower() == ".safetensors":
            write_safetensors(path, cast, finalise(metadata, cast))
        else:
            write_torch(path, cast)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({reason(error)})") from error
