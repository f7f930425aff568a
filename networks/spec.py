"""What a network module is: a type of adapter layer, and the arguments that choose where it goes. No torch here."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from library.entry_points import EntryPoint
from library.errors import UserError
from library.options.network import DEFAULT_RANK
from networks.arguments import LoraPlus, Reader, ignored
from networks.hypernetwork_files import is_hypernetwork_file
from networks.layer_args import LayerArgs
from networks.selection import Selection

if TYPE_CHECKING:
    from library.options.base import Options
    from library.types import BlockLayout, FamilyTraits

A = TypeVar("A", bound=LayerArgs)
BESIDE = {"alpha", "reshape_weight"}  # tensors of layers of any type; the second is a shape that the others say too
_BUILDER: EntryPoint[..., Any] = EntryPoint("networks.build:DeclaredBuilder")


@dataclass(frozen=True, kw_only=True)
class NetworkType(Generic[A]):
    """A type of adapter layer."""

    label: str  # for messages, e.g. "LoRA"
    tensors: str  # pattern of the names of one layer's tensors in files: sorted, joined by spaces, without `BESIDE`
    args: type[A]
    layer: EntryPoint[..., Any]  # the subclass of AdapterLayer
    prefix: str = "lora"  # of layers' names in files, before "_unet_" and "_te_"
    # (entries, targets, args) -> entries: corrects what other trainers wrote otherwise than files of this type are read
    correct: EntryPoint[..., dict[str, Any]] | None = None

    def reads(self, names: frozenset[str]) -> bool:
        """Whether a layer with these tensors in a file is of this type."""
        return bool(re.fullmatch(self.tensors, " ".join(sorted(names - BESIDE))))


@dataclass(frozen=True)
class NetworkArgs:
    """The parsed --network_args."""

    type: NetworkType[Any]
    selection: Selection
    plus: LoraPlus
    layer: LayerArgs


@dataclass(frozen=True, kw_only=True)
class DeclaredModule(ABC):
    """A value of --network_module. A module of `networks` declares one as its `MODULE`."""

    name: str
    builder: EntryPoint[..., Any]  # the class of the NetworkBuilder, which is made of this module
    save_as: str | None = None  # the only --save_model_as that its readers know; None: any

    @abstractmethod
    def check_run(self, opts: Options, args: Mapping[str, str], traits: FamilyTraits | None) -> list[str]:
        """A warning for each option that has no effect. Args: args: --network_args.

        Raises: UserError: options that are refused before a model is read.
        """


@dataclass(frozen=True, kw_only=True)
class NetworkModule(DeclaredModule):
    """A module whose networks are layers of a type, each beside one layer of the model."""

    builder: EntryPoint[..., Any] = _BUILDER
    type: NetworkType[Any]
    selection: type[Selection]
    usual_dim: int = DEFAULT_RANK  # where --network_dim is not given
    lora_plus: bool = True  # whether the sides of a layer may have different learning rates

    @property
    def argument_names(self) -> list[str]:
        """Every argument, as --network_args has them."""
        plus = LoraPlus.NAMES if self.lora_plus else ()
        return [*self.selection.NAMES, *self.type.args.NAMES, *plus]

    @property
    def types(self) -> Sequence[NetworkType[Any]]:
        """The types that files may have from which a network of this module continues."""
        return [self.type]

    def type_of_entry(self, tensors: Iterable[str], args: NetworkArgs) -> NetworkType[Any]:
        """The type of a layer that is read from a file with these tensors."""
        return args.type

    def type_for(self, reader: Reader) -> NetworkType[Any]:
        """The type that the arguments ask for."""
        return self.type

    def parse(
        self, args: Mapping[str, str], dropout: float | None = None, layout: BlockLayout | None = None
    ) -> NetworkArgs:
        """The arguments as values.

        Args:
            dropout: --network_dropout; the argument `dropout` has precedence.
            layout: the family's blocks, for block-wise lists.
        Raises: UserError: every problem at once.
        """
        given = {**({} if dropout is None else {"dropout": str(dropout)}), **args}
        reader = Reader(given, self.argument_names, module=self.name, layout=layout)
        kind = self.type_for(reader)
        plus = LoraPlus.read(reader) if self.lora_plus else LoraPlus()
        parsed = NetworkArgs(kind, self.selection.read(reader), plus, kind.args.read(reader))
        reader.raise_problems()
        return parsed

    def check_run(self, opts: Options, args: Mapping[str, str], traits: FamilyTraits | None) -> list[str]:
        options, layout = opts.method, traits.block_layout if traits else None
        if options.network_weights and is_hypernetwork_file(options.network_weights):
            raise UserError(
                f"--network_weights: {options.network_weights} is a hypernetwork; --network_module="
                "networks.hypernetwork continues from it"
            )
        given = {"args": args, "dropout": options.network_dropout, "layout": layout}
        lines = self.check(**given, dim=options.network_dim or self.usual_dim, ranks_from_file=options.dim_from_weights)
        layer = self.parse(**given).layer
        if not options.dim_from_weights:
            lines += layer.alpha_warnings(options.network_alpha, self.name)
        name = layer.reads_gradients()
        if name and opts.optimizer.fused_backward_pass:
            raise UserError(
                f"--network_args: {name} looks at the gradients after the backward pass, in which "
                "--fused_backward_pass drops them; leave one of the two out"
            )
        return lines

    def check(
        self,
        args: Mapping[str, str],
        dropout: float | None = None,
        layout: BlockLayout | None = None,
        *,
        dim: int,
        ranks_from_file: bool,
    ) -> list[str]:
        """A warning for each argument that has no effect.

        Raises: UserError: arguments that are refused whatever the model.
        """
        parsed = self.parse(args, dropout, layout)
        if not ranks_from_file:
            parsed.selection.check_rank(dim, self.name)
        lines = ignored(args, self.argument_names, self.name)
        if dropout and "dropout" not in self.argument_names:
            lines.append(f"--network_dropout has no effect in {self.name}")
        for group in (parsed.selection, parsed.plus, parsed.layer):
            lines += group.warnings(args, module=self.name, ranks_from_file=ranks_from_file)
        return lines
