"""Network files on the pipelines of diffusers, from Python.

    network = attach(pipeline, "flower.safetensors", 0.8)
    image = pipeline("a sks flower").images[0]
    network.multiplier = 0.4
    network.detach()

`merge` adds a file to the weights for good instead. Files may be of every type and layout that `networks.files` reads.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import networks.lycoris
from library.checkpoints.keymap import first_few
from library.errors import UserError
from library.families.registry import FAMILIES
from library.families.shared.finding import family_of_pipeline
from library.model_tools.model_sources import targets_of
from library.runtime.logs import LOGGER
from library.types import Models
from networks import build
from networks.file_names import require_places, require_types
from networks.files import names_in_files, read, warn_of_words
from networks.targets import live_modules

if TYPE_CHECKING:
    from library.types import LoraTarget
    from networks.files import NetworkFile
    from networks.network import Network


class AttachedNetwork:
    """A network that acts on a pipeline until it is detached. It follows the pipeline from device to device.

    As a context manager it is detached at the end. Networks may be attached beside each other.
    """

    def __init__(self, network: Network, models: Models, multiplier: float, unused: list[str]):
        self.layers = len(network.layers())
        self.unused = unused  # layers of the file that have no place in the pipeline
        self._network = network
        # Each layer goes where its input is, in its precision: pipelines are moved, and offloaded part by part.
        self._moving = [
            module.register_forward_pre_hook(partial(_move, layer))
            for key, layer in network.layers().items()
            for module in live_modules(models, network.targets[key])
        ]
        network.requires_grad_(False).eval()
        network.attach(models)
        self.multiplier = multiplier

    @property
    def multiplier(self) -> float:
        """Strength of the network; 1 is as trained, 0 the bare model."""
        return self._multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        self._multiplier = float(value)
        self._network.set_multiplier(value)

    def detach(self) -> None:
        """The pipeline behaves as before, to the bit."""
        self._network.detach()
        for handle in self._moving:
            handle.remove()
        self._moving.clear()

    def __enter__(self) -> AttachedNetwork:
        return self

    def __exit__(self, *_: Any) -> None:
        self.detach()


def attach(pipeline: Any, path: str | Path, multiplier: float = 1.0) -> AttachedNetwork:
    """Makes a network file act on a pipeline's denoiser and text encoders, whose weights stay as they are.

    Args:
        pipeline: a diffusers pipeline of a family that is known here, on any device; attach before compiling.
        path: a network file.
        multiplier: its strength, which may be changed later.
    Raises: UserError: no network file, of a type that is not known, or made for another model.
    """
    models, targets = _models_of(pipeline)
    builder = build.DeclaredBuilder(networks.lycoris.MODULE)
    file = builder.read(path)
    unused = _require_fit(file, targets)
    return AttachedNetwork(builder.from_weights(targets, models, file, args={}), models, multiplier, unused)


def merge(pipeline: Any, path: str | Path, multiplier: float = 1.0) -> int:
    """Adds a network file to the weights of a pipeline for good. Returns: the number of layers that were changed.

    Args and raises: as `attach`. Weights in half precision are rounded to it.
    """
    models, targets = _models_of(pipeline)
    file = read(path)
    require_types(file.path, file.flat())
    _require_fit(file, targets)
    return build.merge(targets, models, file, multiplier)[0]


def _models_of(pipeline: Any) -> tuple[Models, list[LoraTarget]]:
    """The parts of a pipeline that networks adapt, and their layers."""
    name = family_of_pipeline(pipeline)
    spec = FAMILIES[name]
    parts = {part: getattr(pipeline, folder, None) for part, folder in spec.folders.items()}
    if parts["denoiser"] is None:
        raise UserError(f"the pipeline has no {spec.folders['denoiser']}")
    encoders = {part: parts[part] for part in spec.traits.text_encoders if parts.get(part) is not None}
    models = Models(parts["denoiser"], encoders, {}, None)
    return models, targets_of(name, models)


def _require_fit(file: NetworkFile, targets: list[LoraTarget]) -> list[str]:
    """The file's layers that have no place here, after a warning. Raises: UserError: a whole part has none."""
    warn_of_words(file)
    known = names_in_files(targets)
    require_places(file.path, file.entries, known)
    unused = [layer for layer in file.entries if layer not in known]
    if unused:
        count = len(unused)
        LOGGER.warning("%s: %d layers have no place in the pipeline: %s", file.path, count, first_few(unused))
    return unused


def _move(layer: nn.Module, _module: nn.Module, args: tuple[Any, ...]) -> None:
    x = args[0]
    own = next(layer.parameters())
    dtype = x.dtype if x.dtype in (torch.float16, torch.bfloat16, torch.float32) else own.dtype
    if own.device != x.device or own.dtype != dtype:
        layer.to(x.device, dtype)
