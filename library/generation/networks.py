"""The networks that act while images are generated: attached with a strength for each prompt, or merged."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from library.checkpoints.reading import file_format, read_header
from library.errors import UserError
from library.methods.network import network_builder
from library.methods.network_spec import split_args
from library.model_tools.block_weights import BlockWeights, parse
from library.runtime.logs import LOGGER
from networks.build import DeclaredBuilder, merge
from networks.file_names import require_places, require_types
from networks.files import names_in_files, read
from networks.hypernetwork_files import is_hypernetwork_file
from networks.inputs import with_all_inputs
from networks.network import Network
from networks.targets import live_modules

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.families.base import Family
    from library.options.inference import NetworksOptions
    from library.types import LoraTarget, Models
    from networks.builder import NetworkBuilder
    from networks.files import NetworkFile
    from networks.network import TrainableNetwork

ANY_TYPE = "networks.lycoris"  # ours, whose networks may have layers of every type
_HYPERNETWORK = "networks.hypernetwork"
_BLOCK_WEIGHTS = "lbw"  # the argument of a network that weighs its blocks


@dataclass
class NetworkInUse:
    """One of the networks, by its place in --network_weights."""

    file: NetworkFile
    attached: TrainableNetwork | None  # None: it is merged
    weights: BlockWeights | None = None

    def act(self, strength: float) -> None:
        """Gives an attached network its strength, times the weights of its blocks."""
        if self.attached is None:
            return
        self.attached.set_multiplier(strength)
        if self.weights is not None:
            for key, layer in self.attached.layers().items():
                layer.multiplier = strength * self.weights.factor(key)


@dataclass
class Networks:
    """All networks of a model, and the strengths that they have at present."""

    networks: list[NetworkInUse] = field(default_factory=list)
    merged: int = 0  # the first ones, for good
    weights: MergedWeights | None = None  # of those that are merged again and again
    strengths: tuple[float, ...] = ()

    def use(self, strengths: Sequence[float] | None, usual: Sequence[float]) -> tuple[float, ...]:
        """Gives the networks their strengths, and returns these.

        Args:
            strengths: one for each network, of which the last counts for all that follow; None: the usual ones.
            usual: one for each network. Those that are merged for good keep theirs.
        """
        wanted = list(usual)
        for place in range(self.merged, len(wanted)) if strengths else ():
            wanted[place] = strengths[min(place, len(strengths) - 1)]
        if tuple(wanted) != self.strengths:
            self.strengths = tuple(wanted)
            for network, strength in zip(self.networks, wanted, strict=True):
                network.act(strength)
            if self.weights is not None:
                self.weights.merge(self.networks[self.merged :], wanted[self.merged :])
        return self.strengths

    def attached(self) -> list[TrainableNetwork]:
        """Those that are not merged."""
        return [network.attached for network in self.networks if network.attached is not None]

    @contextmanager
    def only(self, number: int) -> Iterator[None]:
        """Within it, no attached network but that of this number acts."""
        pairs = list(zip(self.networks, self.strengths, strict=True))
        attached = [(network, strength) for network, strength in pairs if network.attached is not None]
        try:
            for place, (network, strength) in enumerate(attached):
                network.act(strength if place == number else 0.0)
            yield
        finally:
            for network, strength in attached:
                network.act(strength)

    def called(self) -> list[tuple[str, float]]:
        """(name, strength) of each."""
        names = [network.file.path.stem for network in self.networks]
        return list(zip(names, self.strengths, strict=True))

    def detach(self) -> None:
        """Takes the networks away that are not merged for good."""
        for network in self.networks:
            if network.attached is not None:
                network.attached.detach()
        if self.weights is not None:
            self.weights.restore()


class MergedWeights:
    """Weights of a model with networks in them, and copies of what they were, on the CPU."""

    def __init__(self, targets: Sequence[LoraTarget], models: Models, files: Sequence[NetworkFile]):
        self._targets, self._models = targets, models
        used = {name for file in files for name in file.entries}
        self._before: list[tuple[nn.Parameter, Tensor]] = [
            (parameter, parameter.detach().to("cpu", copy=True))
            for target in targets
            if names_in_files([target]) & used
            for module in live_modules(models, target)
            for parameter in module.parameters(recurse=False)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, before in self._before:
            parameter.copy_(before)

    def merge(self, networks: Sequence[NetworkInUse], strengths: Sequence[float]) -> None:
        """The weights with these networks in place of those that were merged before."""
        self.restore()
        for network, strength in zip(networks, strengths, strict=True):
            if strength:
                _merge(self._targets, self._models, network.file, strength, network.weights)


def check_files(options: NetworksOptions) -> list[NetworkFile]:
    """Reads the files, with a line of metadata for each where that is asked for.

    Raises: UserError: one is missing or broken, or no network of a type that is known here.
    """
    found, problems = [], []
    for number, path in enumerate(options.network_weights or ()):
        try:
            found.append(_read(path, options, number))
        except UserError as error:
            problems += [f"--network_weights: {problem}" for problem in error.problems]
        else:
            if options.network_show_meta:
                facts = read_header(path)[0] if file_format(path) == "safetensors" else {}
                print(f"{path}:\n{json.dumps(facts, indent=2, ensure_ascii=False)}")
    if problems:
        raise UserError(*problems)
    return found


def _read(path: str, options: NetworksOptions, number: int) -> NetworkFile:
    """The file of the network of this number. Raises: UserError: it is none that can be used as is asked for."""
    if is_hypernetwork_file(path):
        if number < options.merged() or options.network_pre_calc:
            raise UserError(f"{path}: a hypernetwork changes no weights, so it cannot be merged")
        return network_builder(_HYPERNETWORK).read(path)
    file, module = read(path), _module_of(options, number)
    if module is None or module.startswith("networks."):
        require_types(file.path, file.flat())
    return file


def merge_first(options: NetworksOptions, files: Sequence[NetworkFile], family: Family, models: Models) -> None:
    """Merges those that --network_merge means. To be called before weights are cast."""
    targets = family.targets.lora(models)
    files = with_all_inputs(files, targets, models)
    for number, (file, strength) in enumerate(
        zip(files[: options.merged()], options.multipliers(), strict=False),
    ):
        require_places(file.path, file.entries, names_in_files(targets))
        used, unused = _merge(targets, models, file, strength, arguments(options, number, file)[1])
        LOGGER.log(
            logging.WARNING if unused else logging.INFO,
            "%s: %d layers merged at %g; %d layers have no place in this model",
            *(file.path, used, strength, unused),
        )


def attach_rest(
    options: NetworksOptions, files: Sequence[NetworkFile], family: Family, models: Models, device: torch.device
) -> Networks:
    """The networks, those attached that are not merged; none acts before `Networks.use`.

    Raises: UserError: one was made for another kind of model.
    """
    merged = options.merged()
    given = [arguments(options, number, file) for number, file in enumerate(files)]
    networks = Networks(
        [NetworkInUse(file, None, weights) for file, (_, weights) in zip(files, given, strict=True)], merged
    )
    rest = files[merged:]
    if not rest:
        return networks
    targets = family.targets.lora(models)
    rest = with_all_inputs(rest, targets, models)
    for file in rest:
        if not is_hypernetwork_file(file.path):
            require_places(file.path, file.entries, names_in_files(targets))
    if options.network_pre_calc:
        networks.weights = MergedWeights(targets, models, rest)
        return networks
    layout = family.traits.block_layout
    for number, file in enumerate(rest, merged):
        args, weights = given[number]
        builder = _builder(_module_of(options, number), file)
        try:
            network = builder.from_weights(targets, models, file, args=args, layout=layout)
        except UserError as error:
            raise UserError(
                *(f"--network_weights: {problem}" for problem in error.problems), hint=error.hint
            ) from error
        if weights is not None and not isinstance(network, Network):
            raise UserError(
                f"--network_args: {_BLOCK_WEIGHTS}: not possible with hypernetworks and networks of other packages"
            )
        network.requires_grad_(False).eval().to(device)
        network.attach(models)
        unused = len(file.unused(targets))
        LOGGER.log(
            logging.WARNING if unused else logging.INFO,
            "%s: %d layers act; %d have no place in this model",
            *(file.path, len(network.layers()), unused),
        )
        networks.networks[number].attached = network
    return networks


def _builder(module: str | None, file: NetworkFile) -> NetworkBuilder:
    """What makes the network: the module that is named where it can read the file, else what reads every type."""
    if is_hypernetwork_file(file.path):
        return network_builder(_HYPERNETWORK)
    if module is not None:
        builder = network_builder(module)
        if not isinstance(builder, DeclaredBuilder):
            return builder
        try:
            require_types(file.path, file.flat(), builder.module.types)
            return builder
        except UserError:
            LOGGER.info("%s: is of another type than %s, and is read as what it is", file.path, module)
    return network_builder(ANY_TYPE)


def arguments(options: NetworksOptions, number: int, file: NetworkFile) -> tuple[dict[str, str], BlockWeights | None]:
    """What --network_args says of the network of this number, and the weights of its blocks, which are taken out.

    Raises: UserError: weights that cannot be read, or of blocks that the file does not have.
    """
    entries = options.network_args or []
    args = dict(split_args(entries[number].split(";") if number < len(entries) else None))
    text = args.pop(_BLOCK_WEIGHTS, None)
    if text is None:
        return args, None
    try:
        weights = parse(text)
        weights.check(file.entries)
    except UserError as error:
        lines = (problem.replace("--lbws", f"--network_args: {_BLOCK_WEIGHTS}", 1) for problem in error.problems)
        raise UserError(*lines, hint=error.hint) from None
    return args, weights


def _merge(
    targets: Sequence[LoraTarget], models: Models, file: NetworkFile, strength: float, weights: BlockWeights | None
) -> tuple[int, int]:
    """`merge`, with weights of blocks: one time for all layers of one weight."""
    if weights is None:
        return merge(targets, models, file, strength)
    names = names_in_files(targets)
    by_factor: dict[float, dict[str, dict[str, Tensor]]] = {}
    for key, entry in file.entries.items():
        if key in names:
            by_factor.setdefault(weights.factor(key), {})[key] = entry
    merged = [merge(targets, models, replace(file, entries=some), strength * f) for f, some in by_factor.items()]
    used = sum(count for count, _ in merged)
    return used, len(file.entries) - used


def _module_of(options: NetworksOptions, number: int) -> str | None:
    named = options.network_module or []
    return named[number] if number < len(named) else None
