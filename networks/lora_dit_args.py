"""`--network_args` of LoRA for diffusion transformers: what networks.lora_flux and networks.lora_sd3 have in common.

Each of them is a table, `Layout`, of its arguments and the layers that they speak of. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.errors import UserError
from library.options.network import LARGEST_RANK
from networks.lora_args import LoraArgs, Reader, common_fields, unknown
from networks.lora_args import without_effect as without_effect_in_lora

T5 = "te3"  # the text encoder that is trained only when train_t5xxl says so

GGPO = ("ggpo_sigma", "ggpo_beta")
# fmt: off
COMMON_KEYS = (
    "train_t5xxl", "split_qkv", "verbose", "conv_dim", "conv_alpha", "dropout", "rank_dropout", "module_dropout",
    "loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio",
    "network_reg_dims", "network_reg_lrs",
)
# fmt: on


@dataclass(frozen=True)
class BlockKind:
    """A stack of blocks. `pattern` finds its layers by their names in files; its group is the block's number."""

    argument: str  # selects blocks by number
    pattern: str


@dataclass(frozen=True)
class Layout:
    """The arguments of a network module. Patterns are searched for in layers' names in files."""

    module: str  # as --network_module
    blocks: Mapping[str, BlockKind]  # by the words that train_blocks takes; the argument exists where there are several
    types: Mapping[str, str]  # argument with the rank of a type of layer -> pattern
    outer: str  # argument with one rank for each entry of `outer_layers`
    outer_layers: Sequence[str]  # patterns of the layers that are adapted only when `outer` is given
    more: Sequence[str] = ()  # arguments of this module alone

    @property
    def selectors(self) -> tuple[str, ...]:
        """The arguments that choose blocks."""
        several = ("train_blocks",) if len(self.blocks) > 1 else ()
        return (*several, *(kind.argument for kind in self.blocks.values()))

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.selectors, *self.types, self.outer, *COMMON_KEYS, *self.more)


@dataclass(frozen=True)
class Selection:
    """Which blocks of a stack are trained. `numbers`: ranges of their numbers, or None: all."""

    kind: BlockKind
    text: str
    numbers: tuple[range, ...] | None

    def leaves_out(self, key: str) -> bool:
        found = re.search(self.kind.pattern, key)
        return bool(found) and self.numbers is not None and not any(int(found[1]) in part for part in self.numbers)

    def check(self, keys: Sequence[str]) -> None:
        """Raises: UserError: a number that none of the model's layers has."""
        present = {int(found[1]) for key in keys if (found := re.search(self.kind.pattern, key))}
        highest = max((part.stop - 1 for part in self.numbers or ()), default=-1)
        if present and highest > max(present):
            raise UserError(
                f"--network_args: {self.kind.argument}={self.text}: there is no block {highest}; "
                f"this model has 0-{max(present)}"
            )


@dataclass(frozen=True)
class DitArgs(LoraArgs):
    """The parsed arguments. Of several patterns with a rank, the first that is found in a layer's name counts."""

    train_t5xxl: bool = False
    split_qkv: bool = False
    verbose: bool = False
    type_dims: tuple[tuple[re.Pattern[str], int], ...] = ()
    outer_dims: tuple[tuple[re.Pattern[str], int], ...] = ()
    selections: tuple[Selection, ...] = ()
    ggpo_sigma: float | None = None  # both or none
    ggpo_beta: float | None = None


def rank_of(args: DitArgs, dim: int, key: str, *, outer: bool = False) -> int:
    """The rank of a layer; 0: it gets no adapter.

    Blocks that are not selected, and rates of 0, leave a layer out. Otherwise `network_reg_dims` counts first, then the
    type's own argument, then `dim`.

    Args: outer: whether the layer is adapted only when its argument gives it a rank.
    """
    own_lr, own_dim = args.own_lr(key), args.own_dim(key)
    listed = args.outer_dims if outer else args.type_dims
    by_type = next((rank for pattern, rank in listed if pattern.search(key)), 0 if outer else dim)
    if (outer and not by_type) or (own_lr and not own_lr[1]) or any(s.leaves_out(key) for s in args.selections):
        return 0
    return by_type if own_dim is None else own_dim


def parse(args: Mapping[str, str], layout: Layout) -> DitArgs:
    """The arguments as values. Raises: UserError: every problem at once."""
    reader = Reader(args)
    reader.only_lora(layout.keys, layout.module)
    reader.number("conv_dim", int, least=0)
    reader.number("conv_alpha", float, least=0)
    ggpo = {key: reader.number(key, float, least=0) for key in GGPO}
    if len(ggpo.keys() & args.keys()) == 1:
        reader.refuse(*(key for key in GGPO if key in args), f"needs the other one too: {GGPO[0]} and {GGPO[1]}")
    ranks = {key: reader.number(key, int, least=0) for key in layout.types}
    outer = _whole_numbers(reader, layout.outer, len(layout.outer_layers))
    parsed = DitArgs(
        train_t5xxl=reader.flag("train_t5xxl"),
        split_qkv=reader.flag("split_qkv"),
        verbose=reader.flag("verbose"),
        type_dims=tuple((re.compile(layout.types[key]), rank) for key, rank in ranks.items() if rank is not None),
        outer_dims=tuple(zip(map(re.compile, layout.outer_layers), outer, strict=False)),
        selections=_selections(reader, layout),
        **ggpo,
        **common_fields(reader),
    )
    if reader.problems:
        raise UserError(*reader.problems)
    return parsed


def _whole_numbers(reader: Reader, key: str, count: int) -> tuple[int, ...]:
    """``[4,0,2]`` or ``4,0,2``; nothing where the argument is not given."""
    if not reader.args.get(key, "").strip():
        return ()
    try:
        numbers = tuple(int(entry) for entry in reader.args[key].strip().strip("[]").split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count or min(numbers) < 0:
        reader.refuse(key, f"is not {count} whole numbers from 0 up, separated by commas")
        return ()
    if max(numbers) > LARGEST_RANK:
        reader.refuse(key, f"has an entry above {LARGEST_RANK}")
    return numbers


def _selections(reader: Reader, layout: Layout) -> tuple[Selection, ...]:
    trained = reader.args.get("train_blocks", "all").strip()
    if trained not in ("all", *layout.blocks) and len(layout.blocks) > 1:
        reader.refuse("train_blocks", f"is none of all, {', '.join(layout.blocks)}")
        return ()
    chosen = []
    for name, kind in layout.blocks.items():
        text = reader.args.get(kind.argument, "all").strip()
        numbers = _ranges(reader, kind.argument, text)
        chosen.append(Selection(kind, text, numbers if trained in ("all", name) else ()))
    return tuple(chosen)


def _ranges(reader: Reader, key: str, text: str) -> tuple[range, ...] | None:
    """``all``, ``none``, or ``0,1,4-7``, where both ends count."""
    if text == "all":
        return None
    if text in ("none", ""):
        return ()
    ranges = []
    for entry in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", entry)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            reader.refuse(key, f"{entry.strip()!r} is no block; give all, none, or numbers and ranges such as 0,1,4-7")
            return ()
        ranges.append(range(first, last + 1))
    return tuple(ranges)


def check(args: Mapping[str, str], layout: Layout, *, ranks_from_file: bool) -> list[str]:
    """What can be said about the arguments without a model: a warning for each that has no effect.

    Raises: UserError: arguments that `create` would refuse.
    """
    parse(args, layout)
    lines = unknown(args, layout.keys, layout.module)
    lines += [
        f"--network_args: {key} has no effect in {layout.module}: it adapts no convolutions beside those of "
        f"{layout.outer}"
        for key in ("conv_dim", "conv_alpha")
        if key in args
    ]
    trained = args.get("train_blocks", "all").strip()
    lines += [
        f"--network_args: {kind.argument} has no effect with train_blocks={trained}"
        for name, kind in layout.blocks.items()
        if kind.argument in args and trained not in ("all", name)
    ]
    if ranks_from_file:
        others = {key: args[key] for key in args if key not in ("conv_dim", "conv_alpha")}
        lines += without_effect_in_lora(others, ranks_from_file=True)
        chosen = [key for key in (*layout.selectors, "train_t5xxl") if key in args]
        lines += [f"--network_args: {key} has no effect with --dim_from_weights" for key in chosen]
    return lines
