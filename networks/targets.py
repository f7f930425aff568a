"""The live modules that a target covers: hooks on them, and changes of their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from library.types import LoraTarget, Models
    from networks.layer import AdapterLayer


def live_modules(models: Models, target: LoraTarget) -> list[nn.Module]:
    """The modules that a target covers."""
    part = models.denoiser if target.part == "denoiser" else models.text_encoders[target.part]
    return [part.get_submodule(path) for path in target.modules]


def hook(models: Models, target: LoraTarget, layer: AdapterLayer) -> list[RemovableHandle]:
    """Makes `layer` act on the target's modules."""
    kind = _swapped_hook if target.swap_halves else _hook
    modules = enumerate(live_modules(models, target))
    return [module.register_forward_hook(kind(layer, index)) for index, module in modules]


def weight_shape(models: Models, target: LoraTarget) -> torch.Size:
    """The shape of `weight_of`."""
    weights = [module.weight for module in live_modules(models, target)]
    return torch.Size((sum(weight.shape[0] for weight in weights), *weights[0].shape[1:]))


def weight_of(models: Models, target: LoraTarget) -> Tensor:
    """The weights of the target's modules in float32: rows over all of them, in the file's order."""
    rows = [module.weight.detach().float() for module in live_modules(models, target)]
    weight = rows[0] if len(rows) == 1 else torch.cat(rows)
    return _swap_halves(weight, 0) if target.swap_halves else weight


@torch.no_grad()
def add_to_weights(models: Models, target: LoraTarget, change: Tensor) -> None:
    """Adds `change` to the target's weights for good.

    Args: change: rows over all its modules, in the file's order, (sum of out, in, ...).
    """
    modules = live_modules(models, target)
    rows = [module.weight.shape[0] for module in modules]
    for module, part in zip(modules, change.split(rows), strict=True):
        part = _swap_halves(part, 0) if target.swap_halves else part
        summed = module.weight.float() + part.to(module.weight.device, torch.float32).reshape(module.weight.shape)
        module.weight.copy_(summed)


def _hook(layer: AdapterLayer, index: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def adapt(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return layer.adapt(index, args[0], output)

    return adapt


def _swapped_hook(layer: AdapterLayer, index: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """The layer sees the output as the file orders it, so that its tensors are the file's."""

    def adapt(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return _swap_halves(layer.adapt(index, args[0], _swap_halves(output, -1)), -1)

    return adapt


def _swap_halves(tensor: Tensor, axis: int) -> Tensor:
    return tensor.roll(tensor.shape[axis] // 2, axis)
