"""`--network_module networks.hypernetwork`: small networks before the keys and values of a U-Net's attention.

One pair for all attention layers whose context has the same width. They are saved in the layout of AUTOMATIC1111's web
UI, which loads them and so does ComfyUI.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from library.entry_points import EntryPoint
from library.errors import UserError
from library.options.network import LARGEST_RANK
from networks.arguments import ArgumentGroup, Reader, ignored
from networks.hypernetwork_files import is_hypernetwork_file
from networks.spec import DeclaredModule

if TYPE_CHECKING:
    from library.options.base import Options
    from library.types import FamilyTraits

# Those that both loaders know; "swish" is their word for hard swish.
ACTIVATIONS = ("linear", "relu", "leakyrelu", "elu", "swish", "tanh", "sigmoid", "softsign", "mish")
LARGEST_FACTOR = 64  # of a width
_BUILDER: EntryPoint[..., object] = EntryPoint("networks.layers.hypernetwork:HypernetworkBuilder")

Stage = tuple[Literal["linear", "activation", "norm"], int, int]  # with the widths of its input and output


@dataclass(frozen=True)
class HypernetworkArgs(ArgumentGroup):
    """What the networks of all widths have in common."""

    NAMES = ("enable_sizes", "layer_structure", "activation_func", "add_layer_norm", "dropout")

    sizes: tuple[int, ...] = ()  # widths that get a pair of networks; empty: all that the model has
    structure: tuple[float, ...] = (1, 2, 1)  # widths of the layers, as factors
    activation: str = "linear"  # of ACTIVATIONS; "linear" is none
    layer_norm: bool = False  # after each layer
    activate_output: bool = False  # after the last layer too; only networks of other programs have it
    dropout: float = 0.0  # of what is between two layers

    @classmethod
    def read(cls, reader: Reader) -> HypernetworkArgs:
        structure = reader.numbers("layer_structure", float, LARGEST_FACTOR) or cls.structure
        if len(structure) < 2 or structure[0] != 1 or structure[-1] != 1:
            reader.refuse("layer_structure", "must begin and end with 1, as 1,2,1 does")
        activation = reader.args.get("activation_func", "").strip().lower() or cls.activation
        if activation not in ACTIVATIONS:
            reader.refuse("activation_func", f"is none of {', '.join(ACTIVATIONS)}")
        return cls(
            sizes=tuple(int(size) for size in reader.numbers("enable_sizes", int, LARGEST_RANK)),
            structure=structure,
            activation=activation,
            layer_norm=reader.flag("add_layer_norm"),
            dropout=reader.number("dropout", float, least=0, below=1) or 0.0,
        )

    def stages(self, width: int) -> Iterator[Stage]:
        """The stages of one network, in the order in which they are numbered in files."""
        sides = [int(width * factor) for factor in self.structure]
        for number, (inner, outer) in enumerate(pairwise(sides), 2):
            yield "linear", inner, outer
            if self.activation != "linear" and (number < len(sides) or self.activate_output):
                yield "activation", outer, outer
            if self.layer_norm:
                yield "norm", outer, outer

    def __str__(self) -> str:
        structure = ",".join(f"{factor:g}" for factor in self.structure)
        norm, output = " with layer norms" * self.layer_norm, " and an activated output" * self.activate_output
        return f"layer_structure={structure} activation_func={self.activation}{norm}{output}"


@dataclass(frozen=True, kw_only=True)
class HypernetworkModule(DeclaredModule):
    """The declaration of hypernetworks."""

    builder: EntryPoint[..., object] = _BUILDER
    save_as: str | None = "pt"

    def parse(self, args: Mapping[str, str], dropout: float | None = None) -> HypernetworkArgs:
        """The arguments as values. Args: dropout: --network_dropout. Raises: UserError: every problem at once."""
        given = {**({} if dropout is None else {"dropout": str(dropout)}), **args}
        reader = Reader(given, HypernetworkArgs.NAMES, module=self.name)
        parsed = HypernetworkArgs.read(reader)
        reader.raise_problems()
        return parsed

    def check_run(self, opts: Options, args: Mapping[str, str], traits: FamilyTraits | None) -> list[str]:
        options, weights = opts.method, opts.method.network_weights
        problems = []
        if traits and not traits.hypernetworks:
            problems.append(
                f"--network_module: {self.name} is for Stable Diffusion 1.x and 2.x; no program reads hypernetworks "
                f"of {traits.label}"
            )
        if options.network_train_text_encoder_only:
            problems.append(f"--network_train_text_encoder_only: {self.name} acts on the U-Net alone")
        if options.scale_weight_norms:
            problems.append(f"--scale_weight_norms: {self.name} does not offer it; leave it out")
        if weights and not is_hypernetwork_file(weights):
            problems.append(f"--network_weights: {weights} is no hypernetwork, and {self.name} continues from no other")
        if problems:
            raise UserError(*problems)
        self.parse(args, options.network_dropout)
        given = opts.explicit & {"network_dim", "network_alpha", "text_encoder_lr"}
        lines = [f"--{name}: has no effect in {self.name}" for name in sorted(given)]
        if options.dim_from_weights:
            decided = [name for name in HypernetworkArgs.NAMES if name in args and name != "dropout"]
            lines += [f"--network_args: {name} has no effect with --dim_from_weights" for name in decided]
        return lines + ignored(args, HypernetworkArgs.NAMES, self.name)


MODULE = HypernetworkModule(name=__name__)
