"""Layers of diffusion transformers and their text encoders: by block and by type of layer. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from library.errors import UserError
from library.runtime.logs import LOGGER
from networks.arguments import Reader, from_file_warnings
from networks.selection import Choice, Selection, TargetLayer

if TYPE_CHECKING:
    from library.types import LoraTarget

DENOISER = "denoiser"
MODULES = {  # what --network_module should be, by the layers that a model has
    r"^lora_unet_(double|single)_\D*\d": "networks.lora_flux",
    r"^lora_unet_joint_\D*\d": "networks.lora_sd3",
}


@dataclass(frozen=True)
class BlockStack:
    """A stack of blocks. `pattern` finds its layers by their names in files; its group is the block's number."""

    argument: str  # selects blocks by number
    pattern: str


@dataclass(frozen=True)
class ChosenBlocks:
    """Which blocks of a stack are trained. `numbers`: ranges of their numbers, or None: all."""

    stack: BlockStack
    text: str
    numbers: tuple[range, ...] | None

    def leaves_out(self, key: str) -> bool:
        found = re.search(self.stack.pattern, key)
        return bool(found) and self.numbers is not None and not any(int(found[1]) in part for part in self.numbers)

    def check(self, keys: Iterable[str]) -> None:
        """Raises: UserError: a number that none of the model's layers has."""
        present = {int(found[1]) for key in keys if (found := re.search(self.stack.pattern, key))}
        highest = max((part.stop - 1 for part in self.numbers or ()), default=-1)
        if present and highest > max(present):
            raise UserError(
                f"--network_args: {self.stack.argument}={self.text}: there is no block {highest}; "
                f"this model has 0-{max(present)}"
            )


@dataclass(frozen=True)
class DitSelection(Selection):
    """Linear layers of blocks, with ranks by type of layer. A subclass is the table of a model's layers.

    Patterns are searched for in layers' names in files.
    """

    STACKS: ClassVar[Mapping[str, BlockStack]]  # by the words that train_blocks takes, where there are several
    TYPES: ClassVar[Mapping[str, str]]  # argument with the rank of a type of layer -> pattern
    EXTRA: ClassVar[str]  # argument with one rank for each pattern of EXTRA_LAYERS
    EXTRA_LAYERS: ClassVar[Sequence[str]]  # patterns of the layers that are adapted only when EXTRA is given
    SELECTORS: ClassVar[tuple[str, ...]]  # the arguments that choose layers

    train_t5xxl: bool = False
    type_dims: tuple[tuple[re.Pattern[str], int], ...] = ()
    extra_dims: tuple[tuple[re.Pattern[str], int], ...] = ()
    blocks: tuple[ChosenBlocks, ...] = ()

    def __init_subclass__(cls) -> None:
        several = ("train_blocks",) if len(cls.STACKS) > 1 else ()
        cls.SELECTORS = (*several, *(stack.argument for stack in cls.STACKS.values()), "train_t5xxl")
        regs = ("network_reg_dims", "network_reg_lrs")
        cls.NAMES = (*cls.SELECTORS, *cls.TYPES, cls.EXTRA, "verbose", "conv_dim", "conv_alpha", *regs)

    @classmethod
    def read(cls, reader: Reader) -> DitSelection:
        reader.number("conv_dim", int, least=0)
        reader.number("conv_alpha", float, least=0)
        ranks = {name: reader.number(name, int, least=0) for name in cls.TYPES}
        extra = reader.whole_numbers(cls.EXTRA, len(cls.EXTRA_LAYERS))
        return cls(
            reg_dims=reader.by_pattern("network_reg_dims", int),
            reg_lrs=reader.by_pattern("network_reg_lrs", float),
            train_t5xxl=reader.flag("train_t5xxl"),
            verbose=reader.flag("verbose"),
            type_dims=tuple((re.compile(cls.TYPES[name]), rank) for name, rank in ranks.items() if rank is not None),
            extra_dims=tuple(zip(map(re.compile, cls.EXTRA_LAYERS), extra, strict=False)),
            blocks=cls._chosen_blocks(reader),
        )

    @classmethod
    def _chosen_blocks(cls, reader: Reader) -> tuple[ChosenBlocks, ...]:
        trained = reader.args.get("train_blocks", "all").strip()
        if trained not in ("all", *cls.STACKS) and len(cls.STACKS) > 1:
            reader.refuse("train_blocks", f"is none of all, {', '.join(cls.STACKS)}")
            return ()
        chosen = []
        for name, stack in cls.STACKS.items():
            numbers = reader.block_numbers(stack.argument)
            text = reader.args.get(stack.argument, "all").strip()
            chosen.append(ChosenBlocks(stack, text, numbers if trained in ("all", name) else ()))
        return tuple(chosen)

    def warnings(self, given: Mapping[str, str], *, module: str, ranks_from_file: bool) -> list[str]:
        lines = [
            f"--network_args: {name} has no effect in {module}: it adapts no convolutions beside those of {self.EXTRA}"
            for name in ("conv_dim", "conv_alpha")
            if name in given
        ]
        trained = given.get("train_blocks", "all").strip()
        lines += [
            f"--network_args: {stack.argument} has no effect with train_blocks={trained}"
            for name, stack in self.STACKS.items()
            if stack.argument in given and trained not in ("all", name)
        ]
        if ranks_from_file:
            lines += from_file_warnings({name: given[name] for name in given if not name.startswith("conv_")})
            chosen = [name for name in self.SELECTORS if name in given]
            lines += [f"--network_args: {name} has no effect with --dim_from_weights" for name in chosen]
        return lines

    def check_targets(self, targets: Sequence[LoraTarget], module: str) -> None:
        """Raises: UserError: the denoiser has none of the blocks that the arguments are for, or not all of them."""
        keys = [target.key for target in targets if target.part == DENOISER]
        if keys and not any(re.search(stack.pattern, key) for stack in self.STACKS.values() for key in keys):
            fitting = (name for pattern, name in MODULES.items() if any(re.search(pattern, key) for key in keys))
            right = next(fitting, "networks.lora")
            raise UserError(f"--network_module: {module} is for another kind of model; for this one it is {right}")
        for chosen in self.blocks:
            chosen.check(keys)
        if self.train_t5xxl and not any(target.optional and target.part != DENOISER for target in targets):
            LOGGER.warning("--network_args: train_t5xxl has no effect: T5 is not given, or not trained")

    def choose(self, layer: TargetLayer, dim: int, alpha: float | None) -> Choice | None:
        """See `Selection`. `network_reg_dims` counts first, then the type's own argument, then `dim`."""
        target = layer.target
        extra = target.optional and target.part == DENOISER
        if target.optional and not extra and not self.train_t5xxl:
            return None
        own_lr, own_dim = self.own_lr(target.key), self.own_dim(target.key)
        if (own_lr and not own_lr[1]) or any(chosen.leaves_out(target.key) for chosen in self.blocks):
            return None
        listed, default = (self.extra_dims, 0) if extra else (self.type_dims, dim)
        rank = next((rank for pattern, rank in listed if pattern.search(target.key)), default)
        if extra and not rank:
            return None
        rank = rank if own_dim is None else own_dim
        return Choice(rank, alpha) if rank else None
