"""LoRA with matrices of their own for each live module of a layer that is fused in files (`split_qkv`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks import functional
from networks.base import AdapterLayer
from networks.lora import LoraLayer
from networks.lora_args import LoraArgs
from networks.lora_files import Entry, LoraFile


class SplitLoraLayer(AdapterLayer):
    """n LoRA layers of rank r, one for each of the n modules, that a file holds as one of rank n * r.

    The file's down matrix is theirs one below the other, its up matrix has theirs on the diagonal and zeros elsewhere.
    Its alpha is theirs times n, since readers divide it by n * r. The state_dict has the parts as they are trained.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        rank: int,
        alpha: float | None,
        args: LoraArgs,
        kind: Callable[..., LoraLayer] = LoraLayer,
    ):
        super().__init__()
        self.parts = nn.ModuleList(kind([module], rank, alpha, args) for module in modules)

    @property
    def rank(self) -> int:
        """Of each part."""
        return self.parts[0].rank

    @property
    def multiplier(self) -> float:
        return self.parts[0].multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        for part in self.parts:
            part.multiplier = value

    def initialise(self, rng: torch.Generator) -> None:
        """Down kaiming-uniform with a = sqrt(5), up zero: the network starts as the bare model."""
        for part in self.parts:
            part.initialise(rng)

    def load(self, key: str, entry: Entry) -> None:
        """Takes over a file's values. Raises: UserError: another rank or size, or parts that are not apart."""
        for part, own in zip(self.parts, self._cut(key, entry), strict=True):
            part.load(key, own)

    def _cut(self, key: str, entry: Entry) -> list[Entry]:
        count, rows = len(self.parts), [sum(part.rows) for part in self.parts]
        if entry.up.shape[0] != sum(rows):
            raise UserError(f"{key}: the file's layer has {entry.up.shape[0]} outputs, the model's {sum(rows)}")
        if entry.rank != count * self.rank:
            raise UserError(
                f"{key}: the file's rank is {entry.rank}; with split_qkv=True a rank of {self.rank} is "
                f"{count * self.rank} in files",
                hint="give the --network_dim of its training, or --dim_from_weights; or leave split_qkv=True out",
            )
        downs = entry.down.chunk(count)
        blocks = [part.chunk(count, dim=1) for part in entry.up.split(rows)]
        if any(block.any() for i, row in enumerate(blocks) for j, block in enumerate(row) if i != j):
            raise UserError(f"{key}: was not trained with split_qkv=True: its parts share ranks; leave that out")
        return [Entry(downs[i], blocks[i][i], entry.alpha / count) for i in range(count)]

    def file_state(self) -> dict[str, Tensor]:
        downs = [part.lora_down.weight.detach() for part in self.parts]
        ups = [part.lora_up.weight.detach() for part in self.parts]
        alpha = self.parts[0].alpha * len(self.parts)
        return {"alpha": alpha, "lora_down.weight": torch.cat(downs), "lora_up.weight": torch.block_diag(*ups)}

    def adapt(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        return self.parts[index].adapt(0, x, output)

    def before_step(self) -> None:
        for part in self.parts:
            part.before_step()

    @torch.no_grad()
    def limit_norm(self, limit: float) -> None:
        state = self.file_state()
        scale = self.parts[0].scale
        factor = functional.max_norm_factor(state["lora_down.weight"], state["lora_up.weight"], scale, limit)
        for parameter in self.parameters():
            parameter.mul_(factor.to(parameter.dtype))

    def fast_parameters(self) -> list[nn.Parameter]:
        return [part.lora_up.weight for part in self.parts]


def with_trained_scales(file: LoraFile, parts: Mapping[str, int]) -> LoraFile:
    """The file with the alphas of split layers as they are written here, n times that of a part.

    sd-scripts up to 0.10 wrote a part's own alpha, by which readers see 1 / n of the strength that was trained. Such a
    file gives its split layers the alpha that its layers of a part's rank have.

    Args: parts: n, by the names of the layers that are split.
    """
    entries = dict(file.entries)
    whole = {(entry.rank, entry.alpha) for key, entry in entries.items() if key not in parts}
    for key in parts.keys() & entries.keys():
        entry, count = entries[key], parts[key]
        if any(rank * count == entry.rank and math.isclose(alpha, entry.alpha) for rank, alpha in whole):
            entries[key] = replace(entry, alpha=entry.alpha * count)
    return replace(file, entries=entries)
