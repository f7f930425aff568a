"""What `--network_args` says to networks.lora: parsing, block-wise ranks and rates. No torch here."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from library.errors import UserError
from library.options.network import LARGEST_RANK
from library.types import BlockLayout

T = TypeVar("T")

# Arguments of LyCORIS that ask for another kind of network, with the values that ask for LoRA.
_OTHER_KINDS = {"algo": ("lora", "locon"), "dora_wd": ("false", "0", ""), "train_norm": ("false", "0", "")}

UNET_25 = BlockLayout(12, 1, 12)


@dataclass(frozen=True)
class LoraArgs:
    """The parsed arguments. Lists have one entry per block, in the order of `LoraTarget.block`."""

    conv_dim: int | None = None
    conv_alpha: float = 1.0
    dropout: float | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None
    block_dims: tuple[int, ...] | None = None
    block_alphas: tuple[float, ...] | None = None
    conv_block_dims: tuple[int, ...] | None = None
    conv_block_alphas: tuple[float, ...] | None = None
    block_weights: tuple[float, ...] | None = None  # of the learning rate
    denoiser_plus: float | None = None  # LoRA+ ratio
    text_plus: float | None = None
    reg_dims: tuple[tuple[re.Pattern[str], int], ...] = ()  # the first that is found in a layer's key counts
    reg_lrs: tuple[tuple[re.Pattern[str], float], ...] = ()

    @property
    def blocks(self) -> int:
        """How many blocks the lists are for; 0 without lists."""
        lists = (self.block_dims, self.block_alphas, self.conv_block_dims, self.conv_block_alphas, self.block_weights)
        return max(len(entries or ()) for entries in lists)

    @property
    def adapts_convs(self) -> bool:
        return self.conv_dim is not None or self.conv_block_dims is not None

    def block_weight(self, block: int | None) -> float:
        return 1.0 if block is None or self.block_weights is None else self.block_weights[block]

    def own_dim(self, key: str) -> int | None:
        """The rank that `network_reg_dims` gives a layer; None where it says nothing."""
        return next((dim for pattern, dim in self.reg_dims if pattern.search(key)), None)

    def own_lr(self, key: str) -> tuple[int, float] | None:
        """Which entry of `network_reg_lrs` counts for a layer, from 1, and its rate; None where none does."""
        found = ((number, lr) for number, (pattern, lr) in enumerate(self.reg_lrs, 1) if pattern.search(key))
        return next(found, None)


def rank_and_alpha(
    args: LoraArgs, dim: int, alpha: float | None, *, key: str = "", block: int | None, kernel: bool, conv_only: bool
) -> tuple[int, float | None] | None:
    """Rank and alpha of one layer, or None where it gets no adapter.

    What is chosen by key goes before what is chosen by block.

    Args:
        key: the layer's name in files.
        block: index in the block lists; None for layers that belong to no block, such as a text encoder's.
        kernel: whether the layer is a convolution with a kernel larger than 1 x 1.
        conv_only: whether the layer is one that only networks with convolutions adapt.
    """
    if (conv_only or kernel) and not args.adapts_convs:
        return None
    own_lr, own_dim = args.own_lr(key), args.own_dim(key)
    if (args.block_weight(block) if own_lr is None else own_lr[1]) == 0:
        return None
    if own_dim is not None:
        return (own_dim, alpha) if own_dim else None
    if kernel:
        rank = _at(args.conv_block_dims, block, args.conv_dim or 0)
        strength = _at(args.conv_block_alphas, block, args.conv_alpha)
    else:
        rank, strength = _at(args.block_dims, block, dim), _at(args.block_alphas, block, alpha)
    return (rank, strength) if rank else None


def _at(entries: tuple[Any, ...] | None, block: int | None, default: Any) -> Any:
    return default if entries is None or block is None else entries[block]


# ---- reading the texts

_LR_KEYS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
_PRESETS: dict[str, Callable[[float], float]] = {  # of x, which goes from 0 to 1 over the list
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "cosine": lambda x: math.sin(math.pi / 2 * (1 - x)),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}
# fmt: off
KEYS = (
    "conv_dim", "conv_alpha", "dropout", "rank_dropout", "module_dropout",
    "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas",
    "down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold",
    "loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio",
    "network_reg_dims", "network_reg_lrs",
)
# fmt: on


def parse(
    args: Mapping[str, str],
    layout: BlockLayout = UNET_25,
    *,
    module: str = "networks.lora",
    keys: Sequence[str] = KEYS,
) -> LoraArgs:
    """The arguments as values. `keys` are those that `module` knows.

    Raises: UserError: every problem at once: unknown keys, values that are no numbers, lists of the wrong length,
        unknown presets.
    """
    reader = Reader(args)
    reader.only_lora(keys, module)
    conv_alpha = reader.number("conv_alpha", float, least=0)
    parsed = LoraArgs(
        conv_dim=reader.number("conv_dim", int, least=0) or None,
        conv_alpha=1.0 if conv_alpha is None else conv_alpha,
        block_dims=reader.block_list("block_dims", int, layout),
        block_alphas=reader.block_list("block_alphas", float, layout),
        conv_block_dims=reader.block_list("conv_block_dims", int, layout),
        conv_block_alphas=reader.block_list("conv_block_alphas", float, layout),
        block_weights=reader.block_weights(layout),
        **common_fields(reader),
    )
    if reader.problems:
        raise UserError(*reader.problems)
    return parsed


def common_fields(reader: Reader) -> dict[str, Any]:
    """The fields of `LoraArgs` that have nothing to do with convolutions or blocks: dropouts, LoRA+, patterns."""
    denoiser_plus, text_plus = lora_plus(reader)
    return {
        "dropout": reader.number("dropout", float, least=0, most=1),
        "rank_dropout": reader.number("rank_dropout", float, least=0, below=1),
        "module_dropout": reader.number("module_dropout", float, least=0, most=1),
        "denoiser_plus": denoiser_plus,
        "text_plus": text_plus,
        "reg_dims": reader.by_pattern("network_reg_dims", int),
        "reg_lrs": reader.by_pattern("network_reg_lrs", float),
    }


def lora_plus(reader: Reader) -> tuple[float | None, float | None]:
    """The LoRA+ ratios of the denoiser and of the text encoders; None where there is none, which 0 says too."""
    names = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
    common, *own = (reader.number(name, float, least=0) for name in names)
    denoiser, text = ((common if ratio is None else ratio) or None for ratio in own)
    return denoiser, text


def check(
    args: Mapping[str, str], *, ranks_from_file: bool, dim: int | None = None, layout: BlockLayout = UNET_25
) -> list[str]:
    """What can be said about the arguments without a model: a warning for each that has no effect.

    Args: dim: the network's rank.

    Raises: UserError: arguments that `networks.lora.create` would refuse.
    """
    parse(args, layout)
    return [*unknown(args, KEYS, "networks.lora"), *without_effect(args, ranks_from_file=ranks_from_file)]


def unknown(args: Mapping[str, str], keys: Sequence[str], module: str) -> list[str]:
    """A line for every argument that `module`, which knows `keys`, ignores."""
    others = [key for key in args if key not in keys and key not in _OTHER_KINDS]
    near = {key: difflib.get_close_matches(key, keys, n=1) for key in others}
    return [
        f"--network_args: {key} is ignored: {module} knows no such argument"
        + (f"; did you mean {near[key][0]!r}?" if near[key] else "")
        for key in others
    ]


def without_effect(args: Mapping[str, str], *, ranks_from_file: bool = False) -> list[str]:
    """A line for every argument that does nothing in this company."""
    needs = {
        "conv_alpha": ("conv_dim", "conv_block_dims"),
        "conv_block_alphas": ("conv_dim", "conv_block_dims"),
        "block_lr_zero_threshold": _LR_KEYS,
    }
    lines = [
        f"--network_args: {key} has no effect without {' or '.join(others)}"
        for key, others in needs.items()
        if key in args and not any(other in args for other in others)
    ]
    if ranks_from_file:
        given = [key for key in args if key.endswith(("dim", "dims", "alpha", "alphas"))]
        lines += [f"--network_args: {key} has no effect with --dim_from_weights" for key in given]
    return lines


class Reader:
    """Reads single values and collects what is wrong with them."""

    def __init__(self, args: Mapping[str, str]):
        self.args = args
        self.problems: list[str] = []

    def only_lora(self, keys: Sequence[str], module: str) -> None:
        """Refuses arguments that ask for another kind of network than `module` is, which knows `keys`."""
        for key, meaning_lora in _OTHER_KINDS.items():
            if key not in keys and self.args.get(key, meaning_lora[0]).strip().lower() not in meaning_lora:
                self.refuse(key, f"{module} trains no such network; --network_module lycoris.kohya does")

    def refuse(self, key: str, why: str) -> None:
        self.problems.append(f"--network_args: {key}={self.args[key]}: {why}")

    def number(
        self,
        key: str,
        kind: Callable[[str], T],
        *,
        least: float = -math.inf,
        above: float = -math.inf,
        most: float = math.inf,
        below: float = math.inf,
    ) -> T | None:
        if not self.args.get(key, "").strip():
            return None
        try:
            value = kind(self.args[key])
        except ValueError:
            self.refuse(key, f"is not {'a whole number' if kind is int else 'a number'}")
            return None
        if kind is int:  # all of them are ranks, or parts of ranks
            most = min(most, LARGEST_RANK)
        if not (least <= value <= most and above < value < below):
            limits = {"at least": least, "above": above, "at most": most, "below": below}
            words = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
            self.refuse(key, f"must be {', '.join(words) or 'a finite number'}")
            return None
        return value

    def flag(self, key: str) -> bool:
        """Whether the argument is True, or 1; False, 0 and an empty value say the same as nothing."""
        text = self.args.get(key, "").strip().lower()
        if text not in ("true", "1", "false", "0", ""):
            self.refuse(key, "is neither True nor False")
        return text in ("true", "1")

    def block_list(self, key: str, kind: Callable[[str], T], layout: BlockLayout) -> tuple[T, ...] | None:
        if key not in self.args:
            return None
        try:
            entries = tuple(kind(entry) for entry in self.args[key].split(","))
        except ValueError:
            self.refuse(key, f"is not a comma-separated list of {'whole numbers' if kind is int else 'numbers'}")
            return None
        if len(entries) != layout.total:
            self.refuse(key, f"has {len(entries)} entries, this model has {layout.total} blocks")
            return None
        if not all(map(math.isfinite, entries)):
            self.refuse(key, "has an entry that is no finite number")
        elif min(entries) < 0:
            self.refuse(key, "has an entry below 0")
        elif kind is int and max(entries) > LARGEST_RANK:
            self.refuse(key, f"has an entry above {LARGEST_RANK}")
        return entries

    def by_pattern(self, key: str, kind: Callable[[str], T]) -> tuple[tuple[re.Pattern[str], T], ...]:
        """``regex=value,regex=value``; a pattern may hold "=", but no comma."""
        pairs = []
        for entry in self.args.get(key, "").split(","):
            pattern, equals, value = entry.strip().rpartition("=")
            if not entry.strip():
                continue
            try:
                if not equals or not pattern:
                    raise ValueError("is not regex=value")
                number = kind(value)
                if not 0 <= number < math.inf:
                    raise ValueError("must be at least 0")
                if kind is int and number > LARGEST_RANK:
                    raise ValueError(f"must be at most {LARGEST_RANK}")
                pairs.append((re.compile(pattern), number))
            except re.error as error:
                self.refuse(key, f"{pattern!r} is no regular expression ({error})")
            except ValueError as error:
                what = "a whole number" if kind is int else "a number"
                reason = str(error) if str(error).startswith(("is not", "must")) else f"{value!r} is not {what}"
                self.refuse(key, reason)
        return tuple(pairs)

    def block_weights(self, layout: BlockLayout) -> tuple[float, ...] | None:
        threshold = self.number("block_lr_zero_threshold", float)
        if not any(key in self.args for key in _LR_KEYS):
            return None
        weights = [
            weight
            for key, count in zip(_LR_KEYS, (layout.down, layout.mid, layout.up), strict=True)
            for weight in self.rate_list(key, count)
        ]
        edge = [1.0] * layout.edge
        return tuple(w if w > (threshold or 0.0) else 0.0 for w in edge + weights + edge)

    def rate_list(self, key: str, count: int) -> list[float]:
        """`count` factors: a comma list (an empty entry is 0, a short list goes on with 1) or a preset[+offset]."""
        text = self.args.get(key)
        if text is None:
            return [1.0] * count
        try:
            if "," not in text and key != "mid_lr_weight":
                name, _, offset = text.partition("+")
                curve = _PRESETS[name.strip()]
                base = float(offset) if offset else 0.0
                return [curve(i / (count - 1)) + base for i in range(count)]
            factors = [float(entry) if entry.strip() else 0.0 for entry in text.split(",")]
        except KeyError:
            self.refuse(key, f"is neither a comma-separated list nor one of {', '.join(_PRESETS)} (with +offset)")
            return [1.0] * count
        except ValueError:
            self.refuse(key, "holds something that is not a number")
            return [1.0] * count
        if not all(map(math.isfinite, factors)):
            self.refuse(key, "holds something that is no finite number")
        if len(factors) > count:
            self.refuse(key, f"has {len(factors)} entries, there are {count} such blocks")
        return (factors + [1.0] * count)[:count]
