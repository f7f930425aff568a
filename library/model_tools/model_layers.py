"""The layers of a model's file as network files name them: weights are read, and changes written, one at a time.

The model itself is never loaded. Its family builds it on torch's meta device from the shapes in the file; its key map
says which tensors of the file a layer is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from library.checkpoints.keymap import Entry, SwapHalves
from library.checkpoints.scaled import is_scale, scale_of
from library.checkpoints.writing import Deferred
from library.errors import UserError
from library.families.registry import FAMILIES
from library.families.shared.file_model import FileModel, FilePart
from library.families.shared.reading import Reader, error_prefix, open_model
from library.families.shared.recognition import FAMILY_OF, recognise
from library.types import Models
from networks.targets import rows_of, swap_halves, weight_shape

if TYPE_CHECKING:
    from library.families.shared.reading import Weights
    from library.types import LoraTarget

Edit = Callable[[], Tensor]  # makes a layer's new weight or bias: rows over all its modules, in the order of networks
Edits = Mapping[tuple[str, str], Edit]  # by a target's key, and "weight" or "bias"


class _Piece(NamedTuple):
    """The tensor of one module of a layer: the file's tensor that it is in, and which of its parts it is."""

    entry: Entry
    index: int


class _Shapes(Mapping[str, Tensor]):
    """The tensors of an open file without their values, on torch's meta device."""

    def __init__(self, weights: Weights):
        self._weights = weights
        self.shapes = weights.shapes

    def __getitem__(self, key: str) -> Tensor:
        return torch.empty(self._weights.shapes[key], dtype=self._weights.dtype(key), device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@dataclass(frozen=True)
class ModelFile:
    """An open model file. `models` holds its parts on the meta device, for what asks for shapes and classes.

    A layer there that has been given more inputs has them in what is read and written, too, with weights of 0.
    """

    path: Path
    weights: Weights
    family: str
    model: FileModel
    models: Models

    @property
    def parts(self) -> list[str]:
        return [part.name for part in self.model.parts]

    @property
    def targets(self) -> list[LoraTarget]:
        """Every layer that a network may adapt, text encoders first."""
        return [target for part in self.model.parts for target in part.targets]

    def rows(self, target: LoraTarget) -> list[int]:
        """The numbers of output rows of a layer's modules."""
        return rows_of(self.models, target)

    def shape(self, target: LoraTarget) -> torch.Size:
        """The shape of `weight`."""
        return weight_shape(self.models, target)

    def has(self, target: LoraTarget, name: str) -> bool:
        """Whether all modules of the layer have a tensor of this name, "weight" or "bias"."""
        return len(self._pieces(target, name)) == len(target.modules)

    def names(self, target: LoraTarget) -> list[str]:
        """The names of the tensors in the file in which the layer's weight is."""
        return list(dict.fromkeys(piece.entry.file for piece in self._pieces(target, "weight")))

    def weight(self, target: LoraTarget, name: str = "weight") -> Tensor:
        """A layer's weight, or its "bias", in float32: rows over all its modules, in the order of network files.

        Scales of 8 bit weights are multiplied in.
        """
        pieces = self._pieces(target, name)
        if _is_whole(target, pieces):
            return self._read(pieces[0].entry.file).reshape(self._shape(target, name))
        rows = [piece.entry.rule.split(self._read(piece.entry.file))[piece.index] for piece in pieces]
        whole = rows[0] if len(rows) == 1 else torch.cat(rows)
        return (swap_halves(whole, 0) if target.swap_halves else whole).reshape(self._shape(target, name))

    def with_edits(self, edits: Edits, dtype: torch.dtype | None) -> dict[str, Tensor | Deferred]:
        """The file's tensors as they are written when some layers are changed; each is made when its turn comes.

        Args:
            edits: what changes.
            dtype: of every floating tensor; None: as in the file. There, what is changed does not go back into 8 bits,
                in which most of it would be lost, but into bfloat16; so do all weights with scales of their own.
        """
        changes: dict[str, list[tuple[LoraTarget, str, Edit]]] = {}
        for target in self.targets:
            for name in ("weight", "bias"):
                edit = edits.get((target.key, name))
                for piece in self._pieces(target, name) if edit is not None else ():
                    changes.setdefault(piece.entry.file, []).append((target, name, edit))
        return {
            key: self._written(key, list(dict.fromkeys(changes.get(key, ()))), dtype)
            for key in self.weights
            if not is_scale(key)
        }

    def _written(self, key: str, changes: list[tuple[LoraTarget, str, Edit]], dtype: torch.dtype | None) -> Deferred:
        own, shape = self.weights.dtype(key), self._shape_in_file(key) if changes else self.weights.shapes[key]
        scaled = scale_of(key, self.weights) is not None
        small = own.is_floating_point and own.itemsize == 1
        kept = torch.bfloat16 if scaled or (small and changes) else own
        if dtype is not None and own.is_floating_point:
            kept = dtype
        if not changes:
            if kept == own:
                return Deferred(own, shape, lambda: self.weights[key])
            return Deferred(kept, shape, lambda: _cast(self._read(key), kept))
        return Deferred(kept, shape, lambda: _cast(self._changed(key, changes).reshape(shape), kept))

    def _changed(self, key: str, changes: list[tuple[LoraTarget, str, Edit]]) -> Tensor:
        """A tensor of the file with its changes, in float32."""
        target, name, edit = changes[0]
        pieces = self._pieces(target, name)
        if _is_whole(target, pieces):
            return edit()
        rule = pieces[0].entry.rule
        parts = rule.split(self._read(key))
        for target, name, edit in changes:
            value = swap_halves(edit(), 0) if target.swap_halves else edit()
            rows = value.split(self.rows(target))
            for piece, own in zip(self._pieces(target, name), rows, strict=True):
                if piece.entry.file == key:
                    parts[piece.index] = own.reshape(parts[piece.index].shape)
        return rule.join(parts)

    def _read(self, key: str) -> Tensor:
        tensor = Reader(self.weights, torch.float32).take([key])[key]
        wide = self._shape_in_file(key)
        return tensor if tensor.shape == wide else F.pad(tensor, (0, wide[1] - tensor.shape[1]))

    def _shape_in_file(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor of the file, with the inputs that its layer has been given."""
        own = self.weights.shapes[key]
        grown = (target for target in self.targets if target.grows and self.names(target) == [key])
        return next(((own[0], self.shape(target)[1]) for target in grown), own)

    def _shape(self, target: LoraTarget, name: str) -> torch.Size:
        shape = self.shape(target)
        return shape if name == "weight" else shape[:1]

    def _pieces(self, target: LoraTarget, name: str) -> list[_Piece]:
        part = self._part(target)
        pieces = []
        for path in target.modules:
            public = part.public(f"{path}.{name}")
            entry = part.keys.by_model(public)
            if entry is not None and entry.file in self.weights:
                pieces.append(_Piece(entry, entry.models.index(public)))
        return pieces

    def _part(self, target: LoraTarget) -> FilePart:
        return next(part for part in self.model.parts if part.name == target.part)


def open_given(option: str, path: str, families: Collection[str], *, encoder: str | None = None) -> ModelFile:
    """`open_model_file` for a file that an option names, with which problems begin."""
    try:
        return open_model_file(path, families, encoder=encoder)
    except UserError as error:
        raise UserError(*(f"--{option}: {problem}" for problem in error.problems), hint=error.hint) from None


def open_model_file(path: str | Path, families: Collection[str], *, encoder: str | None = None) -> ModelFile:
    """Opens a model's file, or that of a text encoder, without reading weights.

    Args:
        families: names of those that it may be of.
        encoder: the text encoder whose own file it is, "te1" and so on; then there is one family.
    Raises: UserError: missing, damaged, incomplete, or something else.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; give a single file (tools/ has converters from Diffusers folders)")
    weights = open_model(Path(path), mapped=False)  # what is read of a mapped file stays in memory
    with error_prefix(path), torch.device("meta"):
        shapes: Weights = _Shapes(weights)  # type: ignore[assignment]
        kind = recognise(weights)
        family = next(iter(families)) if encoder else FAMILY_OF.get(kind, "")
        if family not in families:
            wanted = " or ".join(str(kind) for name in families for kind in FAMILIES[name].kinds)
            raise UserError(f"this is {kind}; {wanted} is needed here")
        model = FAMILIES[family].file_model(shapes, encoder)
    by_name = {part.name: part.model for part in model.parts}
    encoders = {name: part for name, part in by_name.items() if name != "denoiser"}
    return ModelFile(Path(path), weights, family, model, Models(by_name.get("denoiser"), encoders, {}, None))


def _is_whole(target: LoraTarget, pieces: list[_Piece]) -> bool:
    """Whether a tensor of the file is the layer, with its rows in the order of network files."""
    entry = pieces[0].entry
    in_order = [piece.index for piece in pieces] == list(range(len(entry.models)))
    same = all(piece.entry.file == entry.file for piece in pieces)
    return same and in_order and isinstance(entry.rule, SwapHalves) == target.swap_halves


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.itemsize == 1:  # of what is too large torch would make no number at all
        limit = torch.finfo(dtype).max
        tensor = tensor.clamp(-limit, limit)
    return tensor.to(dtype)
