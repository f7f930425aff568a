"""LoRA with matrices of their own for each live module of a layer that is fused in files (`split_qkv`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.layer import AdapterLayer
from networks.layer_args import LoraArgs, PerturbedLoraArgs, SplitLoraArgs
from networks.layers import functional
from networks.layers.lora import Entry, LoraLayer
from networks.layers.lora_ggpo import PerturbedLoraLayer

if TYPE_CHECKING:
    from library.types import LoraTarget
    from networks.files import Entries


class DitLoraLayer(LoraLayer):
    """LoRA for a diffusion transformer: in parts where the layer is fused and `split_qkv` is given, else whole."""

    @classmethod
    def build(cls, modules: Sequence[nn.Module], rank: int, alpha: float | None, args: SplitLoraArgs) -> AdapterLayer:
        kind = LoraLayer
        if isinstance(args, PerturbedLoraArgs) and args.ggpo_sigma is not None:
            kind = PerturbedLoraLayer
        if args.split_qkv and len(modules) > 1:
            return SplitLoraLayer(modules, rank, alpha, args, kind)
        return kind(modules, rank, alpha, args)

    @classmethod
    def rebuild(cls, modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], args: SplitLoraArgs) -> AdapterLayer:
        entry = Entry.of(tensors)
        rank = max(entry.rank // len(modules), 1) if args.split_qkv else entry.rank  # files have the ranks of all parts
        layer = cls.build(modules, rank, entry.alpha, args)
        layer.load(tensors)
        return layer


class SplitLoraLayer(AdapterLayer):
    """n LoRA layers of rank r, one for each of the n modules, that a file holds as one of rank n * r.

    The file's down matrix is theirs one below the other, its up matrix has theirs on the diagonal and zeros elsewhere.
    Its alpha is theirs times n, since readers divide it by n * r. The state_dict has the parts as they are trained.
    """

    reads_live = False

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
    def rows(self) -> list[int]:
        """Output rows of each part."""
        return [sum(part.rows) for part in self.parts]

    @property
    def shares_input(self) -> bool:
        return self.parts[0].shares_input

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

    def init_weights(self, rng: torch.Generator) -> None:
        """Down kaiming-uniform with a = sqrt(5), up zero: the network starts as the bare model."""
        for part in self.parts:
            part.init_weights(rng)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over a file's values. Raises: UserError: another rank or size, or parts that are not apart."""
        for part, own in zip(self.parts, self._cut(Entry.of(tensors)), strict=True):
            part.load(own)

    def _cut(self, entry: Entry) -> list[dict[str, Tensor]]:
        count, rows = len(self.parts), self.rows
        if entry.up.shape[0] != sum(rows):
            raise UserError(f"the file's layer has {entry.up.shape[0]} outputs, the model's {sum(rows)}")
        if entry.rank != count * self.rank:
            raise UserError(
                f"the file's rank is {entry.rank}; with split_qkv=True a rank of {self.rank} is "
                f"{count * self.rank} in files",
                hint="give the --network_dim of its training, or --dim_from_weights; or leave split_qkv=True out",
            )
        downs = entry.down.chunk(count)
        blocks = [part.chunk(count, dim=1) for part in entry.up.split(rows)]
        if any(block.any() for i, row in enumerate(blocks) for j, block in enumerate(row) if i != j):
            raise UserError("was not trained with split_qkv=True: its parts share ranks; leave that out")
        alpha = torch.tensor(entry.alpha / count)
        cut = range(count)
        return [{"lora_down.weight": downs[i], "lora_up.weight": blocks[i][i], "alpha": alpha} for i in cut]

    def file_state(self) -> dict[str, Tensor]:
        downs = [part.lora_down.weight.detach() for part in self.parts]
        ups = [part.lora_up.weight.detach() for part in self.parts]
        alpha = self.parts[0].alpha * len(self.parts)
        return {"alpha": alpha, "lora_down.weight": torch.cat(downs), "lora_up.weight": torch.block_diag(*ups)}

    def adapt(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        return self.parts[index].adapt(0, x, output)

    def adapt_into(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        return self.parts[index].adapt_into(0, x, output)

    def before_step(self) -> None:
        for part in self.parts:
            part.before_step()

    @torch.no_grad()
    def limit_norm(self, limit: float) -> None:
        state = self.file_state()
        scale = self.parts[0].scale
        factor = functional.max_norm_factor(state["lora_down.weight"], state["lora_up.weight"], scale, limit)
        for parameter in self.parameters():
            parameter.mul_(factor)

    def fast_parameters(self) -> list[nn.Parameter]:
        return [part.lora_up.weight for part in self.parts]


def with_trained_scales(entries: Entries, targets: Sequence[LoraTarget], args: SplitLoraArgs) -> Entries:
    """The entries with the alphas of split layers as they are written here, n times that of a part.

    sd-scripts up to 0.10 wrote a part's own alpha, by which readers see 1 / n of the strength that was trained. Such a
    file gives its split layers the alpha that its layers of a part's rank have.

    Args: targets: of the entries.
    """
    parts = {target.key: len(target.modules) for target in targets if args.split_qkv and len(target.modules) > 1}
    read = {key: Entry.of(tensors) for key, tensors in entries.items()}
    whole = {(entry.rank, entry.alpha) for key, entry in read.items() if key not in parts}
    corrected = dict(entries)
    for key in parts.keys() & read.keys():
        entry, count = read[key], parts[key]
        if any(rank * count == entry.rank and math.isclose(alpha, entry.alpha) for rank, alpha in whole):
            corrected[key] = {**entries[key], "alpha": torch.tensor(entry.alpha * count)}
    return corrected
