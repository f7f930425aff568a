"""The modules of a fused layer one by one, as some files have them: each has a layer of its own, of any type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.fused import ROWS, unstacked
from networks.layer import AdapterLayer
from networks.layer_args import LayerArgs
from networks.registry import LOCON, LORA, STACK, type_of
from networks.spec import NetworkType


class StackedLayer(AdapterLayer):
    """One layer for each module that the file's entry has something of; the others are left as they are."""

    def __init__(self, modules: Sequence[nn.Module], parts: Mapping[int, AdapterLayer]):
        super().__init__()
        self.rows = [module.weight.shape[0] for module in modules]
        self.parts = nn.ModuleDict({str(place): part for place, part in parts.items()})

    @classmethod
    def rebuild(cls, modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], args: LayerArgs) -> StackedLayer:
        parts = {}
        for place, (_, entry) in enumerate(unstacked(tensors)):
            if entry:
                kind = _type_of(entry)
                parts[place] = kind.layer.load().rebuild([modules[place]], entry, kind.args.like(args))
        return cls(modules, parts)

    @property
    def rank(self) -> int:
        return max(part.rank for part in self._layers())

    @property
    def multiplier(self) -> float:
        return next(self._layers()).multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        for part in self._layers():
            part.multiplier = value

    def _layers(self) -> Iterator[AdapterLayer]:
        return iter(self.parts.values())

    def init_weights(self, rng: torch.Generator) -> None:
        """Nothing: such layers come from files."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        entries = {place: entry for place, (_, entry) in enumerate(unstacked(tensors)) if entry}
        if entries.keys() != set(map(int, self.parts)):
            raise UserError(f"the file has modules {sorted(entries)} of a fused layer, the network {list(self.parts)}")
        for place, entry in entries.items():
            self.parts[str(place)].load(entry)

    def adapt(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        return self.parts[str(index)].adapt(0, x, output) if str(index) in self.parts else output

    def file_state(self) -> dict[str, Tensor]:
        return {
            f"{place}/{name}": tensor
            for place, part in self.parts.items()
            for name, tensor in part.file_state().items()
        }

    def before_step(self) -> None:
        for part in self._layers():
            part.before_step()

    def limit_norm(self, limit: float) -> None:
        """Each module's own."""
        for part in self._layers():
            part.limit_norm(limit)

    def fast_parameters(self) -> list[nn.Parameter]:
        return [parameter for part in self._layers() for parameter in part.fast_parameters()]

    def instead(self, index: int, x: Tensor) -> Tensor | None:
        return self.parts[str(index)].instead(0, x) if str(index) in self.parts else None

    @classmethod
    def weight_change(cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor]) -> Tensor:
        return cls.merged_change(tensors, shape, weight, 1.0)

    @classmethod
    def merged_change(
        cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor], multiplier: float
    ) -> Tensor:
        pieces, device = unstacked(tensors), _device(tensors)
        if sum(rows for rows, _ in pieces) != shape[0]:
            raise UserError(f"has {[rows for rows, _ in pieces]} rows where {shape[0]} are expected")
        changes, start = [], 0
        for rows, entry in pieces:
            own, part = torch.Size((rows, *shape[1:])), slice(start, start + rows)
            if entry:
                layer = _type_of(entry).layer.load()
                changes.append(layer.merged_change(entry, own, lambda part=part: weight()[part], multiplier))
            else:
                changes.append(torch.zeros(own, device=device))
            start += rows
        return torch.cat(changes)

    @classmethod
    def bias_change(cls, tensors: Mapping[str, Tensor]) -> Tensor | None:
        pieces = [
            (rows, _type_of(entry).layer.load().bias_change(entry) if entry else None)
            for rows, entry in unstacked(tensors)
        ]
        if all(bias is None for _, bias in pieces):
            return None
        device = _device(tensors)
        return torch.cat([torch.zeros(rows, device=device) if bias is None else bias for rows, bias in pieces])


def _type_of(entry: Mapping[str, Tensor]) -> NetworkType[Any]:
    """The type of a module's entry. Raises: UserError: of none that is known here."""
    kind = type_of(entry)
    if kind is None or kind == STACK:
        raise UserError(f"{', '.join(sorted(entry))} are of no type that is known here")
    return LOCON if kind == LORA else kind


def _device(tensors: Mapping[str, Tensor]) -> torch.device:
    return next(tensor.device for name, tensor in tensors.items() if not name.endswith(f"/{ROWS}"))
