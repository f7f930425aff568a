"""Networks that give a layer more inputs than the model's has: control LoRAs, by which it reads a control image, too.

New inputs stand behind the model's own, and begin with weights of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional as F

from library.runtime.logs import LOGGER
from networks.files import names_of
from networks.targets import live_modules

if TYPE_CHECKING:
    from library.types import LoraTarget, Models
    from networks.files import NetworkFile

_DOWN = "lora_down.weight"


def new_inputs(file: NetworkFile, targets: Sequence[LoraTarget]) -> dict[str, int]:
    """For each layer that may grow and is in the file as LoRA, by its name there, the inputs that it has there."""
    names = (name for target in targets if target.grows for name in names_of(target))
    entries = {name: file.entries[name] for name in names if name in file.entries}
    return {name: entry[_DOWN].shape[1] for name, entry in entries.items() if _DOWN in entry}


def with_all_inputs(files: Sequence[NetworkFile], targets: Sequence[LoraTarget], models: Models) -> list[NetworkFile]:
    """Gives the model's layers the inputs that any file has, and the files those that the model's layers have."""
    for target in (target for target in targets if target.grows):
        (module,) = live_modules(models, target)
        widest = max((max(new_inputs(file, [target]).values(), default=0) for file in files), default=0)
        if widest > module.in_features:
            widen(module, widest)
    return [with_inputs_of(file, targets, models) for file in files]


def with_inputs_of(file: NetworkFile, targets: Sequence[LoraTarget], models: Models) -> NetworkFile:
    """The file with as many inputs as the model's layers have: with zeros for others, and without what is too much."""
    entries = dict(file.entries)
    for target in (target for target in targets if target.grows):
        (module,) = live_modules(models, target)
        for name, inputs in new_inputs(file, [target]).items():
            if inputs > module.in_features:
                LOGGER.warning(
                    "%s: is a control LoRA; there is no control image here, so what %d of the %d inputs of %s would "
                    "read of it is left out",
                    *(file.path, inputs - module.in_features, inputs, name),
                )
            if inputs == module.in_features:
                continue
            down = entries[name][_DOWN]
            fitted = F.pad(down.float(), (0, module.in_features - inputs)).to(down.dtype)
            entries[name] = {**entries[name], _DOWN: fitted}
    return replace(file, entries=entries)


def widen(module: nn.Linear, inputs: int) -> None:
    """Gives a layer so many inputs; the new ones have weights of 0."""
    weight = module.weight
    wide = F.pad(weight.detach(), (0, inputs - weight.shape[1]))
    module.weight = nn.Parameter(wide, requires_grad=weight.requires_grad)
    module.in_features = inputs
