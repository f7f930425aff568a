"""Networks of adapter layers on a live model: one forward hook per adapted module, nothing replaced or patched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from networks.targets import hook

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from library.types import LoraTarget, Models
    from networks.layer import AdapterLayer
    from networks.spec import NetworkArgs


class TrainableNetwork(nn.Module, ABC):
    """What the training of a network needs of it, whoever wrote it. Its state_dict is what a resumed run needs.

    `train()` and `eval()` switch dropouts.
    """

    @abstractmethod
    def attach(self, models: Models) -> None:
        """Makes the layers act on `models`. Attach before compiling."""

    @abstractmethod
    def layers(self) -> Mapping[str, nn.Module]:
        """By the names that the file has."""

    @abstractmethod
    def parts(self) -> list[str]:
        """Names of the model parts that are adapted."""

    @abstractmethod
    def counts(self) -> Counter[str]:
        """Layers per part."""

    @abstractmethod
    def ranks(self) -> set[int]:
        """Every rank that occurs."""

    @abstractmethod
    def parameter_groups(self, rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """Optimizer groups with "params", "lr" and "name". A part missing in `rates` or with rate 0 has none."""

    @abstractmethod
    def set_multiplier(self, multiplier: float) -> None:
        """Strength of the whole network; 1 is as trained, 0 the bare model."""

    def detach(self) -> None:
        """Takes the network away from the model, or leaves it there without any effect."""
        self.set_multiplier(0.0)

    def can_limit_norms(self) -> bool:
        return True

    @abstractmethod
    def limit_norms(self, limit: float) -> None:
        """Shrinks every layer that is being trained until the norm of its change is at most `limit`."""

    def start_epoch(self) -> None:
        """Called before each epoch."""

    def start_step(self) -> None:
        """Called before each optimizer step, and before its forward passes."""

    def before_step(self) -> None:
        """Called before each optimizer step, when the gradients are as the step sees them."""

    def file_state(self) -> dict[str, Tensor]:
        """What the file holds."""
        return self.state_dict()

    def torch_content(self, tensors: dict[str, Tensor], name: str, metadata: Mapping[str, str]) -> dict[Any, Any]:
        """What a .pt or .ckpt file holds, in which metadata has no place of its own.

        Args: tensors: of `file_state`, as they shall be saved; name: of the file, without its ending.
        """
        return tensors


class Network(TrainableNetwork):
    """Adapter layers as children named by their target's key, so that the state_dict is the file.

    Hooks do nothing in place and hold no reference from the model's modules to be saved: a model's own state_dict
    stays what it was.
    """

    def __init__(self, layers: Mapping[str, AdapterLayer], targets: Sequence[LoraTarget], args: NetworkArgs):
        """`targets` has those of all layers, and may have more. `args` chose the layers, and have their rates."""
        super().__init__()
        for key, layer in layers.items():
            self.add_module(key, layer)
        by_key = {target.key: target for target in targets}
        self.targets = {key: by_key[key] for key in layers}
        self.args = args
        self._handles: list[RemovableHandle] = []

    def layers(self) -> dict[str, AdapterLayer]:
        return dict(self.named_children())

    def attach(self, models: Models) -> None:
        """Makes the layers act on `models`. Attach before compiling. Raises: ValueError: attached already."""
        if self._handles:
            raise ValueError("this network is attached already")
        for key, layer in self.layers().items():
            self._handles += hook(models, self.targets[key], layer)

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
            self._name_in_file(key, name): tensor
            for key, layer in self.layers().items()
            for name, tensor in layer.file_state().items()
        }

    def _name_in_file(self, key: str, tensor: str) -> str:
        place, of_piece, name = tensor.partition("/")
        if not of_piece:
            return f"{key.replace('lora', self.args.type.prefix, 1)}.{tensor}"
        return f"lycoris_{self.targets[key].modules[int(place)].replace('.', '_')}.{name}"  # as SimpleTuner writes them

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

    def ranks(self) -> set[int]:
        return {layer.rank for layer in self.layers().values()}

    def parameter_groups(self, rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """Optimizer groups, one for each rate and side. A part missing in `rates` or with rate 0 has none.

        Args: rates: learning rate of each part, text encoders in the order in which --text_encoder_lr counts them.
        """
        groups: dict[str, dict[str, Any]] = {}
        for key, layer in self.layers().items():
            name, lr = self._rate(self.targets[key], rates)
            if not lr:
                continue
            plus = self.args.plus
            ratio = plus.denoiser if self.targets[key].part == "denoiser" else plus.text
            fast = {id(parameter) for parameter in layer.fast_parameters()} if ratio else set()
            for parameter in layer.trained_parameters():
                label, own_lr = (f"{name} plus", lr * ratio) if id(parameter) in fast else (name, lr)
                group = groups.setdefault(label, {"params": [], "lr": own_lr, "name": label})
                group["params"].append(parameter)
        return list(groups.values())

    def _rate(self, target: LoraTarget, rates: Mapping[str, float]) -> tuple[str, float]:
        """The name of a layer's optimizer group and its learning rate, before LoRA+."""
        selection, lr = self.args.selection, rates.get(target.part)
        if not lr:
            return "", 0.0
        text_parts = [part for part in self.parts() if part != "denoiser"]
        if target.part == "denoiser":
            name = "unet"
        elif len(text_parts) == 1:
            name = "textencoder"
        else:
            name = f"textencoder {[part for part in rates if part != 'denoiser'].index(target.part) + 1}"
        own = selection.own_lr(target.key)
        if own is not None:
            return f"{name} reg {own[0]}", own[1]
        factor = selection.lr_factor(target)
        return (name, lr) if factor is None else (f"{name} block {target.block}", lr * factor)
