"""The networks that act while images are generated: attached with a strength for each prompt, or merged."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from library.checkpoints.reading import file_format, read_header
from library.errors import UserError
from library.methods.network import network_builder
from library.methods.network_spec import split_args
from library.runtime.logs import LOGGER
from networks.build import DeclaredBuilder, merge
from networks.file_names import require_places, require_types
from networks.files import names_in_files, read
from networks.inputs import with_all_inputs
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


@dataclass
class NetworkInUse:
    """One of the networks, by its place in --network_weights."""

    file: NetworkFile
    attached: TrainableNetwork | None  # None: it is merged


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
                if network.attached is not None:
                    network.attached.set_multiplier(strength)
            if self.weights is not None:
                self.weights.merge([network.file for network in self.networks], wanted)
        return self.strengths

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

    def merge(self, files: Sequence[NetworkFile], strengths: Sequence[float]) -> None:
        """The weights with these networks in place of those that were merged before."""
        self.restore()
        for file, strength in zip(files, strengths, strict=True):
            if strength:
                merge(self._targets, self._models, file, strength)


def check_files(options: NetworksOptions) -> list[NetworkFile]:
    """Reads the files, with a line of metadata for each where that is asked for.

    Raises: UserError: one is missing or broken, or no network of a type that is known here.
    """
    found, problems = [], []
    for number, path in enumerate(options.network_weights or ()):
        try:
            file = read(path)
            module = _module_of(options, number)
            if module is None or module.startswith("networks."):
                require_types(file.path, file.flat())
            found.append(file)
        except UserError as error:
            problems += [f"--network_weights: {problem}" for problem in error.problems]
        else:
            if options.network_show_meta:
                facts = read_header(path)[0] if file_format(path) == "safetensors" else {}
                print(f"{path}:\n{json.dumps(facts, indent=2, ensure_ascii=False)}")
    if problems:
        raise UserError(*problems)
    return found


def merge_first(options: NetworksOptions, files: Sequence[NetworkFile], family: Family, models: Models) -> None:
    """Merges those that --network_merge means. To be called before weights are cast."""
    targets = family.targets.lora(models)
    files = with_all_inputs(files, targets, models)
    for file, strength in zip(files[: options.merged()], options.multipliers(), strict=False):
        require_places(file.path, file.entries, names_in_files(targets))
        used, unused = merge(targets, models, file, strength)
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
    networks = Networks([NetworkInUse(file, None) for file in files], merged)
    rest = files[merged:]
    if not rest:
        return networks
    targets = family.targets.lora(models)
    rest = with_all_inputs(rest, targets, models)
    for file in rest:
        require_places(file.path, file.entries, names_in_files(targets))
    if options.network_pre_calc:
        networks.weights = MergedWeights(targets, models, rest)
        return networks
    entries, layout = options.network_args or [], family.traits.block_layout
    for number, file in enumerate(rest, merged):
        args = split_args(entries[number].split(";") if number < len(entries) else None)
        builder = _builder(_module_of(options, number), file)
        try:
            network = builder.from_weights(targets, models, file, args=args, layout=layout)
        except UserError as error:
            raise UserError(
                *(f"--network_weights: {problem}" for problem in error.problems), hint=error.hint
            ) from error
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


def _module_of(options: NetworksOptions, number: int) -> str | None:
    named = options.network_module or []
    return named[number] if number < len(named) else None
