"""Types whose change needs the bare weight or output: (IA)^3 and GLoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.layer_args import ChangeArgs
from networks.layers.change import ChangeLayer


class Ia3Layer(ChangeLayer):
    """(IA)^3: every output channel times ``1 + weight``, or every input channel (arXiv:2205.05638)."""

    scalar_name = "weight"

    def __init__(self, modules: Sequence[nn.Module], rank: int, alpha: float | None, args: ChangeArgs, shapes=None):
        super().__init__(modules, 1, 1.0, args, shapes)
        self.register_buffer("on_input", torch.tensor(int(args.train_on_input)))

    def tensor_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        width = self.shape[1 if self.args.train_on_input else 0]
        return {"weight": (width,) if self.geometry is None else (1, width, 1, 1)}

    @classmethod
    def rebuild(cls, modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], args: ChangeArgs) -> Ia3Layer:
        args = ChangeArgs(train_on_input=bool(tensors["on_input"]), module_dropout=args.module_dropout)
        layer = cls(modules, 1, 1.0, args)
        layer.load(tensors)
        return layer

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        return 1

    def init_weights(self, rng: torch.Generator) -> None:
        nn.init.zeros_(self.weight)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors["weight"].numel() != self.weight.numel() or bool(tensors["on_input"]) != bool(self.on_input):
            given, own = tuple(tensors["weight"].shape), tuple(self.weight.shape)
            raise UserError(f"weight {given} on {'inputs' if tensors['on_input'] else 'outputs'} does not fit {own}")
        self.weight.data.copy_(tensors["weight"].reshape(self.weight.shape))

    def adapt(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        axis = [-1] if self.geometry is None else [-1, 1, 1]
        weight = self.weight.flatten() * self.multiplier
        module = self._live[index]
        if self.args.train_on_input:
            scaled = x * weight.reshape(axis)
            change = self.operate(scaled, module.weight.detach().to(weight.dtype))
        else:
            bare = output if module.bias is None else output - module.bias.detach().reshape(axis).to(output.dtype)
            change = bare.to(weight.dtype) * weight[self.rows_of(index)].reshape(axis)
        return output + self._dropped(change).to(output.dtype)

    def file_state(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach(), "on_input": self.on_input}

    @classmethod
    def weight_change(cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor]) -> Tensor:
        factors, on_input = tensors["weight"].float(), bool(tensors["on_input"])
        if factors.numel() != shape[1 if on_input else 0]:
            raise UserError(f"weight {tuple(tensors['weight'].shape)} does not fit {tuple(shape)}")
        axes = [1] * len(shape)
        axes[1 if on_input else 0] = -1
        return weight() * factors.reshape(axes)

    @torch.no_grad()
    def limit_norm(self, limit: float) -> None:
        norm = self.weight.float().norm()
        self.weight.mul_((limit / norm).clamp(max=1))


class GloraLayer(ChangeLayer):
    """GLoRA: ``W a1 a2 + b1 b2`` (arXiv:2306.07967)."""

    def tensor_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        out, width, *kernel = self.shape
        ones = [1] * len(kernel)
        return {
            "a1.weight": (width, rank, *ones),
            "a2.weight": (rank, width, *ones),
            "b1.weight": (out, rank, *ones),
            "b2.weight": (rank, width, *kernel),
        }

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        return tensors["a2.weight"].shape[0]

    def tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name.replace(".", "_")) for name in self.names}
        if self.scalar is not None:
            found |= {name: found[name] * self.scalar for name in ("a2.weight", "b2.weight")}
        return found

    @classmethod
    def product(cls, tensors: Mapping[str, Tensor], rows: slice = slice(None)) -> Tensor:
        """Of the part that does not depend on the weight."""
        return tensors["b1.weight"][rows].flatten(1) @ tensors["b2.weight"].flatten(1)

    @property
    def degree(self) -> int:
        return 2

    def whole_change(self) -> Tensor:
        weight = self._weight().to(self.alpha.device)  # a block that is swapped lies elsewhere between steps
        return _glora(self.tensors(), weight) * self.scale

    def init_weights(self, rng: torch.Generator) -> None:
        for name in self.names:
            nn.init.kaiming_uniform_(getattr(self, name.replace(".", "_")), a=math.sqrt(5), generator=rng)
        if self.scalar is None:
            nn.init.zeros_(self.a2_weight)
            nn.init.zeros_(self.b2_weight)

    def changed(self, x: Tensor, index: int, factor: float) -> Tensor:
        own = self.tensors()
        inner, outer = own["a2.weight"].flatten(1), own["a1.weight"].flatten(1)
        channels = x.movedim(1, -1) if self.geometry else x
        mixed = (channels @ inner.T) @ outer.T
        mixed = mixed.movedim(-1, 1) if self.geometry else mixed
        weight = self._live[index].weight.detach().to(x.dtype)
        up, down = own["b1.weight"][self.rows_of(index)].flatten(1), own["b2.weight"]
        hidden = self.operate(x, down.reshape(down.shape[0], *self.shape[1:]))
        beside = (hidden.movedim(1, -1) @ up.T).movedim(-1, 1) if self.geometry else hidden @ up.T
        return (self.operate(mixed, weight) + beside) * factor

    @classmethod
    def weight_change(cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor]) -> Tensor:
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        own = cls.product(tensors).shape
        if own.numel() != shape.numel():
            raise UserError(f"shape {tuple(own)} does not fit {tuple(shape)}")
        return _glora(tensors, weight()) * cls.scale_of(tensors)

    def fast_parameters(self) -> list[nn.Parameter]:
        return [self.b1_weight]


def _glora(tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """``W a1 a2 + b1 b2`` in the shape of W, (out, in, ...)."""
    mixed = tensors["a1.weight"].flatten(1) @ tensors["a2.weight"].flatten(1)
    return torch.einsum("oi...,ij->oj...", weight, mixed) + GloraLayer.product(tensors).reshape(weight.shape)
