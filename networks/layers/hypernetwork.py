"""Hypernetworks on a live U-Net: what they compute, and how they are made and read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.checkpoints.reading import read_torch
from library.errors import UserError
from library.runtime.logs import LOGGER
from library.runtime.seeds import generator
from networks.builder import NetworkBuilder
from networks.files import NetworkFile
from networks.hypernetwork import ACTIVATIONS, HypernetworkArgs, HypernetworkModule
from networks.hypernetwork_files import file_content, in_order, is_hypernetwork, widths
from networks.network import TrainableNetwork
from networks.targets import live_modules

if TYPE_CHECKING:
    from library.types import BlockLayout, LoraTarget, Models

SIDES = ("to_k", "to_v")  # ends of the paths of attention's projections, in the order of files
FIRST_DEVIATION = 0.01  # of the weights that are drawn
_ACTIVATION_CLASSES = dict(
    zip(
        ACTIVATIONS[1:],
        (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Mish),
        strict=True,
    )
)

Places = dict[int, tuple[list[nn.Module], list[nn.Module]]]  # by width, the projections of keys and of values


class ContextNetwork(nn.Module):
    """``x + multiplier * linear(x)``, where `linear` is a chain of layers. Its state_dict is that of files."""

    multiplier: float = 1.0

    def __init__(self, width: int, args: HypernetworkArgs):
        super().__init__()
        stages: list[nn.Module] = []
        for kind, inner, outer in args.stages(width):
            if kind == "linear":  # drawing must not touch the global random stream
                stages.append(nn.utils.skip_init(nn.Linear, inner, outer))
            else:
                stages.append(nn.LayerNorm(outer) if kind == "norm" else _ACTIVATION_CLASSES[args.activation]())
        self.linear = nn.Sequential(*stages)
        self.dropout = args.dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        if not torch.is_autocast_enabled(x.device.type):
            hidden = x.to(self.linear[0].weight.dtype)  # the base may be stored in fewer bits than what is trained
        for number, stage in enumerate(self.linear):
            if number and isinstance(stage, nn.Linear):
                hidden = F.dropout(hidden, self.dropout, self.training)
            hidden = stage(hidden)
        return x + (hidden * self.multiplier).to(x.dtype)

    def layers(self) -> list[nn.Module]:
        """The stages that have weights, in their order."""
        return [stage for stage in self.linear if isinstance(stage, (nn.Linear, nn.LayerNorm))]

    @torch.no_grad()
    def init_weights(self, rng: torch.Generator) -> None:
        """Normal weights; norms that do nothing; and zeros in the last layer, so that nothing is changed yet."""
        for layer in self.layers():
            nn.init.zeros_(layer.bias)
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=FIRST_DEVIATION, generator=rng)
        nn.init.zeros_(self.layers()[-1].weight)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over the values of a file. Raises: UserError: it has other layers."""
        given, own = in_order(state), [dict(layer.named_parameters()) for layer in self.layers()]
        shapes, fitting = ([{k: tuple(v.shape) for k, v in one.items()} for one in some] for some in (given, own))
        if shapes != fitting:
            raise UserError(f"has layers of {_shown(shapes)}, and not of {_shown(fitting)}")
        for layer, tensors in zip(own, given, strict=True):
            for name, parameter in layer.items():
                parameter.copy_(tensors[name])


def _shown(shapes: list[dict[str, tuple[int, ...]]]) -> str:
    return ", ".join("x".join(map(str, layer.get("weight", ()))) for layer in shapes) or "no kind"


class Hypernetwork(TrainableNetwork):
    """Two `ContextNetwork`s for each width, by its number: for the inputs of keys, and for those of values."""

    def __init__(self, sizes: Sequence[int], args: HypernetworkArgs, places: Places):
        super().__init__()
        self.args, self._places = args, places
        for width in sorted(sizes):
            self.add_module(str(width), nn.ModuleList(ContextNetwork(width, args) for _ in SIDES))

    def attach(self, models: Models) -> None:
        for width, pair in self.layers().items():
            for network, projections in zip(pair, self._places[int(width)], strict=True):
                for projection in projections:
                    projection.register_forward_pre_hook(lambda _, args, net=network: (net(args[0]), *args[1:]))

    def layers(self) -> dict[str, nn.ModuleList]:
        return dict(self.named_children())

    def networks(self) -> list[ContextNetwork]:
        return [network for pair in self.layers().values() for network in pair]

    def parts(self) -> list[str]:
        return ["denoiser"]

    def counts(self) -> Counter[str]:
        return Counter(denoiser=sum(len(side) for width in self.layers() for side in self._places[int(width)]))

    def ranks(self) -> set[int]:
        return set()

    def parameter_groups(self, rates: Mapping[str, float]) -> list[dict[str, Any]]:
        lr = rates.get("denoiser")
        return [{"params": list(self.parameters()), "lr": lr, "name": "unet"}] if lr else []

    def set_multiplier(self, multiplier: float) -> None:
        for network in self.networks():
            network.multiplier = float(multiplier)

    def can_limit_norms(self) -> bool:
        return False

    def limit_norms(self, limit: float) -> None:
        raise NotImplementedError("see can_limit_norms")

    def torch_content(self, tensors: dict[str, Tensor], name: str, metadata: Mapping[str, str]) -> dict[Any, Any]:
        facts = {
            "layer_structure": list(self.args.structure),
            "activation_func": self.args.activation,
            "is_layer_norm": self.args.layer_norm,
            "activate_output": self.args.activate_output,
            "weight_initialization": "Normal",
        }
        return file_content(tensors, facts, name, metadata)


@dataclass(frozen=True)
class HypernetworkFile(NetworkFile):
    """A hypernetwork's file. Entries are those of widths, by their numbers."""

    args: HypernetworkArgs  # without sizes and dropout


class HypernetworkBuilder(NetworkBuilder):
    """Makes hypernetworks. The weights of a width depend on the seed and the width only."""

    def __init__(self, module: HypernetworkModule):
        self.module = module

    def read(self, path: str | Path) -> HypernetworkFile:
        content = read_torch(path)
        if not is_hypernetwork(content):
            raise UserError(f"{path}: is no hypernetwork")
        entries = {
            str(width): {f"{side}.{name}": tensor for side, state in enumerate(pair) for name, tensor in state.items()}
            for width, pair in widths(content).items()
        }
        activation = str(content.get("activation_func") or "linear").lower()
        if activation not in ACTIVATIONS:
            raise UserError(f"{path}: its activation_func is {activation!r}; {', '.join(ACTIVATIONS)} can be used")
        try:
            structure = tuple(float(factor) for factor in content.get("layer_structure") or (1, 2, 1))
        except (TypeError, ValueError):
            raise UserError(f"{path}: its layer_structure is no list of numbers") from None
        args = HypernetworkArgs(
            structure=structure,
            activation=activation,
            layer_norm=bool(content.get("is_layer_norm", False)),
            # The web UI's own default. Without an activation it means nothing.
            activate_output=activation != "linear" and bool(content.get("activate_output", True)),
        )
        return HypernetworkFile(Path(path), entries, args)

    def create(
        self,
        targets: Sequence[LoraTarget],
        models: Models,
        *,
        dim: int,
        alpha: float | None,
        args: Mapping[str, str],
        seed: int,
        dropout: float | None = None,
        layout: BlockLayout | None = None,
    ) -> Hypernetwork:
        parsed, places = self.module.parse(args, dropout), _places(targets, models)
        missing = [size for size in parsed.sizes if size not in places]
        if missing:
            words = "--network_args: enable_sizes: no attention layer here takes inputs of width %s; there are %s"
            LOGGER.warning(words, ", ".join(map(str, missing)), _listed(places))
        sizes = [size for size in places if not parsed.sizes or size in parsed.sizes]
        if not sizes:
            raise UserError(f"--network_args: enable_sizes leaves no width to train; there are {_listed(places)}")
        network = Hypernetwork(sizes, parsed, places)
        for width, pair in network.layers().items():
            rng = generator("cpu", seed, "network", width)
            for one in pair:
                one.init_weights(rng)
        return network

    def from_weights(
        self,
        targets: Sequence[LoraTarget],
        models: Models,
        file: NetworkFile,
        *,
        args: Mapping[str, str],
        dropout: float | None = None,
        layout: BlockLayout | None = None,
    ) -> Hypernetwork:
        assert isinstance(file, HypernetworkFile)
        places = _places(targets, models)
        own = self.module.parse({"dropout": args["dropout"]} if "dropout" in args else {}, dropout)
        sizes = [size for size in places if str(size) in file.entries]
        network = Hypernetwork(sizes, replace(file.args, dropout=own.dropout), places)
        self.load(network, file)
        return network

    def load(self, network: TrainableNetwork, file: NetworkFile) -> tuple[int, int, int]:
        assert isinstance(network, Hypernetwork)
        assert isinstance(file, HypernetworkFile)
        own = network.layers()
        found = [width for width in own if width in file.entries]
        if not found:
            raise UserError(
                f"{file.path}: is for inputs of width {_listed(file.entries)}; attention here has other ones; "
                "was it made for another kind of model?"
            )
        asked = replace(network.args, sizes=(), dropout=0.0)
        if asked != file.args:
            hint = "give the --network_args of its training, or --dim_from_weights"
            raise UserError(f"{file.path}: is a hypernetwork of {file.args}, and not of {asked}", hint=hint)
        for width in found:
            for side, one in enumerate(own[width]):
                state = {n.partition(".")[2]: t for n, t in file.entries[width].items() if n.startswith(f"{side}.")}
                try:
                    one.load(state)
                except UserError as error:
                    raise UserError(*(f"{file.path}: {width}: {problem}" for problem in error.problems)) from error
        return len(found), len(own) - len(found), len(file.entries) - len(found)


def _places(targets: Sequence[LoraTarget], models: Models) -> Places:
    """The projections of the denoiser's attention layers. Raises: UserError: it is not trained, or has none."""
    found: Places = {}
    for target in targets:
        side = next((side for side, end in enumerate(SIDES) if target.modules[0].endswith(f".{end}")), None)
        if target.part == "denoiser" and side is not None:
            (module,) = live_modules(models, target)
            found.setdefault(module.in_features, ([], []))[side].append(module)
    if not found:
        raise UserError("nothing would be trained: a hypernetwork acts on the U-Net; give it a learning rate above 0")
    return dict(sorted(found.items()))


def _listed(names: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, names))
