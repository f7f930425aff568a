"""Layers of U-Nets and CLIP: by kind of layer, and by block. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from networks.arguments import Reader, from_file_warnings
from networks.selection import Choice, Selection, TargetLayer

if TYPE_CHECKING:
    from library.types import LoraTarget

_LR_NAMES = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
_PRESETS: dict[str, Callable[[float], float]] = {  # of x, which goes from 0 to 1 over the list
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "cosine": lambda x: math.sin(math.pi / 2 * (1 - x)),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}


@dataclass(frozen=True)
class UnetSelection(Selection):
    """Linear layers and 1x1 convolutions (LoRA-LierLa); with conv_dim larger convolutions too (LoRA-C3Lier, LoCon).

    Lists have one entry for each block, in the order of `LoraTarget.block`.
    """

    # fmt: off
    NAMES = (
        "conv_dim", "conv_alpha",
        "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas",
        *_LR_NAMES, "block_lr_zero_threshold",
        "network_reg_dims", "network_reg_lrs",
    )
    # fmt: on

    conv_dim: int | None = None
    conv_alpha: float = 1.0
    block_dims: tuple[int, ...] | None = None
    block_alphas: tuple[float, ...] | None = None
    conv_block_dims: tuple[int, ...] | None = None
    conv_block_alphas: tuple[float, ...] | None = None
    block_weights: tuple[float, ...] | None = None  # of the learning rate

    @classmethod
    def read(cls, reader: Reader) -> UnetSelection:
        conv_alpha = reader.number("conv_alpha", float, least=0)
        return cls(
            reg_dims=reader.by_pattern("network_reg_dims", int),
            reg_lrs=reader.by_pattern("network_reg_lrs", float),
            conv_dim=reader.number("conv_dim", int, least=0) or None,
            conv_alpha=1.0 if conv_alpha is None else conv_alpha,
            block_dims=reader.block_list("block_dims", int),
            block_alphas=reader.block_list("block_alphas", float),
            conv_block_dims=reader.block_list("conv_block_dims", int),
            conv_block_alphas=reader.block_list("conv_block_alphas", float),
            block_weights=_block_weights(reader),
        )

    def warnings(self, given: Mapping[str, str], *, module: str, ranks_from_file: bool) -> list[str]:
        needs = {
            "conv_alpha": ("conv_dim", "conv_block_dims"),
            "conv_block_alphas": ("conv_dim", "conv_block_dims"),
            "block_lr_zero_threshold": _LR_NAMES,
        }
        lines = [
            f"--network_args: {name} has no effect without {' or '.join(others)}"
            for name, others in needs.items()
            if name in given and not any(other in given for other in others)
        ]
        return lines + (from_file_warnings(given) if ranks_from_file else [])

    def check_targets(self, targets: Sequence[LoraTarget], module: str) -> None:
        """Raises: UserError: there are block lists, and the model has no blocks, or more than they are for."""
        lists = (self.block_dims, self.block_alphas, self.conv_block_dims, self.conv_block_alphas, self.block_weights)
        count = max(len(entries or ()) for entries in lists)
        if not count:
            return
        numbers = [target.block for target in targets if target.block is not None]
        what = "--network_args: block-wise ranks and rates"
        if not numbers:
            raise UserError(f"{what}: nothing that is trained here has numbered blocks")
        if max(numbers) >= count:
            raise UserError(f"{what}: the lists are for {count} blocks, and this model has {max(numbers) + 1}")

    def choose(self, layer: TargetLayer, dim: int, alpha: float | None) -> Choice | None:
        """See `Selection`. What is chosen by pattern goes before what is chosen by block."""
        target, convs = layer.target, self.conv_dim is not None or self.conv_block_dims is not None
        if target.optional or ((target.conv_only or layer.kernel) and not convs):
            return None
        own_lr, own_dim = self.own_lr(target.key), self.own_dim(target.key)
        if own_lr[1] == 0 if own_lr else self.lr_factor(target) == 0:
            return None
        if own_dim is not None:
            return Choice(own_dim, alpha) if own_dim else None
        if layer.kernel:
            rank = _at(self.conv_block_dims, target.block, self.conv_dim or 0)
            strength = _at(self.conv_block_alphas, target.block, self.conv_alpha)
        else:
            rank, strength = _at(self.block_dims, target.block, dim), _at(self.block_alphas, target.block, alpha)
        return Choice(rank, strength) if rank else None

    def lr_factor(self, target: LoraTarget) -> float | None:
        if target.block is None or target.part != "denoiser" or self.block_weights is None:
            return None
        return self.block_weights[target.block]


@dataclass(frozen=True)
class OneRankSelection(UnetSelection):
    """Layers that all have --network_dim and --network_alpha, convolutions included."""

    NAMES = ("conv_dim", "conv_alpha")

    def warnings(self, given: Mapping[str, str], *, module: str, ranks_from_file: bool) -> list[str]:
        if "conv_alpha" not in given:
            return []
        return [f"--network_args: {module} gives convolutions --network_alpha; conv_alpha has no effect"]

    def check_rank(self, dim: int, module: str) -> None:
        if self.conv_dim not in (None, dim):
            raise UserError(f"--network_args: conv_dim={self.conv_dim}: must be --network_dim, {dim}, in {module}")

    def choose(self, layer: TargetLayer, dim: int, alpha: float | None) -> Choice | None:
        chosen = super().choose(layer, dim, alpha)
        return chosen and Choice(dim, alpha)


def _at(entries: tuple[Any, ...] | None, block: int | None, default: Any) -> Any:
    return default if entries is None or block is None else entries[block]


def _block_weights(reader: Reader) -> tuple[float, ...] | None:
    """Factors on the learning rates of all blocks; 0 for those that are not above the threshold."""
    threshold, layout = reader.number("block_lr_zero_threshold", float), reader.layout
    if not any(name in reader.args for name in _LR_NAMES):
        return None
    counts = zip(_LR_NAMES, (layout.down, layout.mid, layout.up), strict=True)
    weights = [weight for name, count in counts for weight in _factors(reader, name, count)]
    edge = [1.0] * layout.edge
    return tuple(w if w > (threshold or 0.0) else 0.0 for w in edge + weights + edge)


def _factors(reader: Reader, name: str, count: int) -> list[float]:
    """`count` factors: a comma list (an empty entry is 0, a short list is filled up with 1) or a preset[+offset]."""
    text = reader.args.get(name)
    if text is None:
        return [1.0] * count
    try:
        if "," not in text and name != "mid_lr_weight":
            preset, _, offset = text.partition("+")
            curve = _PRESETS[preset.strip()]
            base = float(offset) if offset else 0.0
            return [curve(i / (count - 1)) + base for i in range(count)]
        factors = [float(entry) if entry.strip() else 0.0 for entry in text.split(",")]
    except KeyError:
        reader.refuse(name, f"is neither a comma-separated list nor one of {', '.join(_PRESETS)} (with +offset)")
        return [1.0] * count
    except ValueError:
        reader.refuse(name, "holds something that is not a number")
        return [1.0] * count
    if not all(map(math.isfinite, factors)):
        reader.refuse(name, "holds something that is no finite number")
    if len(factors) > count:
        reader.refuse(name, f"has {len(factors)} entries, there are {count} such blocks")
    return (factors + [1.0] * count)[:count]
