"""How adapter layers attach to a live model: one forward hook per adapted module, nothing replaced or patched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from library.types import LoraTarget, Models


class AdapterLayer(nn.Module):
    """One entry of a network file. Its state_dict keys are what stands behind the entry's name in the file."""

    multiplier: float = 1.0

    def adapt(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        """The output that the `index`-th module of the target shall have for input `x`, instead of `output`."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Called before each optimizer step, when the gradients are as the step sees them; never waits."""

    def limit_norm(self, limit: float) -> None:
        """Scales the trained tensors so that the norm of the weight change is at most `limit`; never waits."""
        raise NotImplementedError

    def trained_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def file_state(self) -> dict[str, Tensor]:
        """What the file holds of this layer."""
        return self.state_dict()

    def fast_parameters(self) -> list[nn.Parameter]:
        """The parameters whose rate LoRA+ raises (arXiv:2402.12354)."""
        return []


class TrainableNetwork(nn.Module):
    """What the training of a network needs of it, whoever wrote it. Its state_dict is what a resumed run needs.

    `train()` and `eval()` switch dropouts.
    """

    def attach(self, models: Models) -> None:
        """Makes the layers act on `models`. Attach before compiling."""
        raise NotImplementedError

    def layers(self) -> Mapping[str, nn.Module]:
        """By the names that the file has."""
        raise NotImplementedError

    def parts(self) -> list[str]:
        """Names of the model parts that are adapted."""
        raise NotImplementedError

    def counts(self) -> Counter[str]:
        """Layers per part."""
        raise NotImplementedError

    def ranks(self) -> set[int]:
        """Every rank that occurs."""
        raise NotImplementedError

    def parameter_groups(self, rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """Optimizer groups with "params", "lr" and "name". A part missing in `rates` or with rate 0 has none."""
        raise NotImplementedError

    def set_multiplier(self, multiplier: float) -> None:
        """Strength of the whole network; 1 is as trained, 0 the bare model."""
        raise NotImplementedError

    def can_limit_norms(self) -> bool:
        return True

    def limit_norms(self, limit: float) -> None:
        """Shrinks every layer that is being trained until the norm of its change is at most `limit`."""
        raise NotImplementedError

    def start_epoch(self) -> None:
        """Called before each epoch."""

    def start_step(self) -> None:
        """Called before each optimizer step, and before its forward passes."""

    def before_step(self) -> None:
        """Called before each optimizer step, when the gradients are as the step sees them."""

    def file_state(self) -> dict[str, Tensor]:
        """What the file holds."""
        return self.state_dict()


class Network(TrainableNetwork):
    """Adapter layers as children named by their target's key, so that the state_dict is the file.

    Hooks do nothing in place and hold no reference from the model's modules to be saved: a model's own state_dict
    stays what it was.
    """

    def __init__(self, layers: Mapping[str, AdapterLayer], targets: Mapping[str, LoraTarget]):
        super().__init__()
        for key, layer in layers.items():
            self.add_module(key, layer)
        self.targets = {key: targets[key] for key in layers}
        self._handles: list[RemovableHandle] = []

    def layers(self) -> dict[str, AdapterLayer]:
        return dict(self.named_children())

    def attach(self, models: Models) -> None:
        """Makes the layers act on `models`. Attach before compiling. Raises: ValueError: attached already."""
        if self._handles:
            raise ValueError("this network is attached already")
        for key, layer in self.layers().items():
            hook = _swapped_hook if self.targets[key].swap_halves else _hook
            for index, module in enumerate(live_modules(models, self.targets[key])):
                self._handles.append(module.register_forward_hook(hook(layer, index)))

    def detach(self) -> None:
        """Takes every hook away; the models behave as before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def set_multiplier(self, multiplier: float) -> None:
        """Strength of the whole network; 1 is as trained, 0 the bare model."""
        for layer in self.layers().values():
            layer.multiplier = float(multiplier)

    def file_state(self) -> dict[str, Tensor]:
        return {
            f"{key}.{name}": tensor
            for key, layer in self.layers().items()
            for name, tensor in layer.file_state().items()
        }

    def before_step(self) -> None:
        for layer in self.layers().values():
            layer.before_step()

    def limit_norms(self, limit: float) -> None:
        """`limit_norm` of every layer that is being trained."""
        for layer in self.layers().values():
            if any(parameter.requires_grad for parameter in layer.parameters()):
                layer.limit_norm(limit)

    def parts(self) -> list[str]:
        """Names of the model parts that are adapted."""
        return list(dict.fromkeys(target.part for target in self.targets.values()))

    def counts(self) -> Counter[str]:
        """Layers per part."""
        return Counter(target.part for target in self.targets.values())


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


def live_modules(models: Models, target: LoraTarget) -> list[nn.Module]:
    """The modules that a target covers."""
    part = models.denoiser if target.part == "denoiser" else models.text_encoders[target.part]
    return [part.get_submodule(path) for path in target.modules]


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
