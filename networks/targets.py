"""The live modules that a target covers: hooks on them, and changes of their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from networks.layers.copies import cast_input
from networks.selection import TargetLayer

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from library.types import LoraTarget, Models
    from networks.layer import AdapterLayer


ORIGINAL_CLASSES = {"Attention": "CrossAttention", "CLIPSdpaAttention": "CLIPAttention"}  # by the live ones


def live_modules(models: Models, target: LoraTarget) -> list[nn.Module]:
    """The modules that a target covers."""
    part = models.denoiser if target.part == "denoiser" else models.text_encoders[target.part]
    return [part.get_submodule(path) for path in target.modules]


def layer_of(models: Models, target: LoraTarget) -> TargetLayer:
    """What selections see of a target. Containers have the class names of the original code where they differ."""
    module = live_modules(models, target)[0]
    kernel = isinstance(module, nn.Conv2d) and tuple(module.kernel_size) != (1, 1)
    if target.place is not None:
        return TargetLayer(target, kernel, target.place.path, target.place.classes)
    part = models.denoiser if target.part == "denoiser" else models.text_encoders[target.part]
    names = target.modules[0].split(".")
    paths = [".".join(names[:length]) for length in range(1, len(names))]
    classes = ((path, type(part.get_submodule(path)).__name__) for path in paths)
    return TargetLayer(target, kernel, target.modules[0], tuple((p, ORIGINAL_CLASSES.get(c, c)) for p, c in classes))


def rows_of(models: Models, target: LoraTarget) -> list[int]:
    """The numbers of output rows of a target's modules."""
    return [module.weight.shape[0] for module in live_modules(models, target)]


def file_modules(models: Models, target: LoraTarget) -> list[nn.Module]:
    """The target's modules, with their output rows as files have them."""
    modules = live_modules(models, target)
    return [InFileOrder(module) for module in modules] if target.swap_halves else modules


class InFileOrder(nn.Linear):
    """A linear layer whose two halves of output rows are the other way round in files. It keeps no weights."""

    def __init__(self, module: nn.Linear):
        nn.Module.__init__(self)
        self._live = [module]  # a list, so that it is not part of this one
        self.in_features, self.out_features = module.in_features, module.out_features

    @property
    def weight(self) -> Tensor:
        return swap_halves(self._live[0].weight, 0)

    @property
    def bias(self) -> Tensor | None:
        return None if self._live[0].bias is None else swap_halves(self._live[0].bias, 0)


def hook(models: Models, target: LoraTarget, layer: AdapterLayer) -> list[RemovableHandle]:
    """Makes `layer` act on the target's modules."""
    handles = []
    for index, module in enumerate(live_modules(models, target)):
        made: list[Tensor] = []
        if layer.shares_input:
            handles.append(module.register_forward_pre_hook(cast_input))
        if not target.swap_halves:
            handles.append(module.register_forward_pre_hook(_spare(layer, index, made)))
        handles.append(module.register_forward_hook(_hook(layer, index, target.swap_halves, made)))
    return handles


def weight_shape(models: Models, target: LoraTarget) -> torch.Size:
    """The shape of `weight_of`."""
    weights = [module.weight for module in live_modules(models, target)]
    return torch.Size((sum(weight.shape[0] for weight in weights), *weights[0].shape[1:]))


def has_bias(models: Models, target: LoraTarget, length: int) -> bool:
    """Whether the target's modules have biases, of so many entries together."""
    biases = [module.bias for module in live_modules(models, target)]
    return all(bias is not None for bias in biases) and sum(map(len, biases)) == length


def weight_of(models: Models, target: LoraTarget) -> Tensor:
    """The weights of the target's modules in float32: rows over all of them, in the file's order."""
    rows = [module.weight.detach().float() for module in live_modules(models, target)]
    weight = rows[0] if len(rows) == 1 else torch.cat(rows)
    return swap_halves(weight, 0) if target.swap_halves else weight


@torch.no_grad()
def add_to_weights(models: Models, target: LoraTarget, change: Tensor, name: str = "weight") -> None:
    """Adds `change` to the target's weights, or to the parameter called `name`, for good.

    Args: change: rows over all its modules, in the file's order, (sum of out, in, ...).
    """
    modules = live_modules(models, target)
    rows = [module.weight.shape[0] for module in modules]
    for module, part in zip(modules, change.split(rows), strict=True):
        own, part = getattr(module, name), swap_halves(part, 0) if target.swap_halves else part
        own.copy_(own.float() + part.to(own.device, torch.float32).reshape(own.shape))


def _spare(layer: AdapterLayer, index: int, made: list[Tensor]) -> Callable[..., tuple[Any, ...] | None]:
    """Puts the output into `made` where the layer makes it alone; the module itself then gets an input without rows."""

    def spare(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        made.clear()
        output = layer.instead(index, args[0]) if layer.within is None else None
        if output is None:
            return None
        made.append(output)
        return args[0].flatten(0, -2)[:0], *args[1:]

    return spare


def _hook(
    layer: AdapterLayer, index: int, swap: bool, made: list[Tensor]
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """
    Args:
        swap: the layer sees the output as the file orders it, so that its tensors are the file's.
        made: see `_spare`.
    """

    def adapt(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if made:
            return made.pop()
        if layer.within is None:
            if swap:
                return swap_halves(layer.adapt_into(index, args[0], swap_halves(output, -1)), -1)
            return layer.adapt_into(index, args[0], output)

        def adapted() -> Tensor:  # beside the output, which stays
            if swap:
                return swap_halves(layer.adapt(index, args[0], swap_halves(output, -1)), -1)
            return layer.adapt(index, args[0], output)

        return layer.within(output, adapted)

    return adapt


def swap_halves(tensor: Tensor, axis: int) -> Tensor:
    """The two halves along an axis in each other's place: from the order of files to that of live modules, and back."""
    return tensor.roll(tensor.shape[axis] // 2, axis)
