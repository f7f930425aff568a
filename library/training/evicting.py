"""Whether the denoiser's modulation may stay in CPU memory, beside what is trained."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from library.errors import UserError
from library.memory.modulation import EvictedModulation
from library.runtime.logs import LOGGER
from networks.network import Network

if TYPE_CHECKING:
    from torch import nn

    from library.families.base import Family
    from library.options.base import Options
    from library.types import Models

_FLAG = "--evict_modulation"


def require_unread(family: Family, models: Models, opts: Options, added: nn.Module | None) -> None:
    """Finds what cannot go with --evict_modulation as soon as there is something to train, before caches are filled.

    Args: added: what is trained beside the model.
    Raises: UserError: it changes what the modulation layers are computed from, or reads their weights.
    """
    if opts.modulation.count:
        embedding, layers = _modulation(family, models)
        _require_unread(added, opts.method.network_module, embedding, layers)


def evict_modulation(family: Family, models: Models, opts: Options, device: torch.device) -> EvictedModulation | None:
    """Keeps the denoiser's modulation layers from `device`; None: not asked for. Call it before `place_denoiser`.

    Raises: UserError: there is a text encoder that training changes.
    """
    if not opts.modulation.count:
        return None
    if models.text_encoders:
        encoders = ", ".join(models.text_encoders)
        raise UserError(f"{_FLAG}: needs texts that training does not change, and {encoders} reads them in every step")
    embedding, layers = _modulation(family, models)
    if device.type == "cpu":
        LOGGER.warning("%s: saves nothing on a CPU; the model is in CPU memory anyway", _FLAG)
    return EvictedModulation(models.denoiser.get_submodule(embedding), list(layers.values()), device)


def _modulation(family: Family, models: Models) -> tuple[str, dict[str, nn.Module]]:
    assert family.modulation is not None, "the option is that of families with modulation"
    return family.modulation(models)


def _require_unread(network: nn.Module | None, kind: str | None, embedding: str, layers: Collection[str]) -> None:
    if not isinstance(network, Network):
        raise UserError(f"{_FLAG}: cannot be used with {kind}, which may read the weights; leave it out")
    for key, layer in network.layers().items():
        target = network.targets[key]
        if target.part != "denoiser":
            continue
        if any(path.startswith(f"{embedding}.") for path in target.modules):
            raise UserError(f"{_FLAG}: {key} is trained, on which the modulation depends; leave one of them out")
        if layer.reads_live and not set(layers).isdisjoint(target.modules):
            raise UserError(f"{_FLAG}: {kind} reads the weights of {key}; leave the layer or the option out")
