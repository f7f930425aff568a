"""What types of layers have in common whose change has the size of the weight: all but plain LoRA."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from networks.layer import AdapterLayer
from networks.layer_args import ChangeArgs
from networks.types.functional import effective_alpha

BIAS = "diff_b"  # the change of a bias, which some files have beside that of the weight


class ChangeLayer(AdapterLayer):
    """``output + multiplier * op(x, scale * change)``, where `op` is that of the live module.

    A change is a product of trained tensors. Several fused linear layers have one change, of which each takes its rows.
    """

    scalar_name: str  # the tensor that takes in the trained factor of `use_scalar` in files
    geometry: dict[str, Any] | None = None  # of a convolution; None: linear layers

    def __init__(
        self,
        modules: Sequence[nn.Module],
        rank: int,
        alpha: float | None,
        args: ChangeArgs,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ):
        """`shapes`: of the trained tensors, by their names in files; otherwise `rank` and `args` say them."""
        super().__init__()
        first = modules[0]
        if isinstance(first, nn.Conv2d):
            if len(modules) > 1 or first.groups > 1 or first.padding_mode != "zeros":
                raise TypeError(f"cannot adapt {len(modules)} module(s) like {first}")
            self.geometry = {name: getattr(first, name) for name in ("stride", "padding", "dilation")}
        self._live = list(modules)  # a list, so that they are not part of this layer
        self.args = args
        self.rows = [module.weight.shape[0] for module in modules]
        self.shape = torch.Size((sum(self.rows), *first.weight.shape[1:]))
        self.names = list(shapes or self.tensor_shapes(rank))
        for name, shape in (shapes or self.tensor_shapes(rank)).items():
            self.register_parameter(_attribute(name), nn.Parameter(torch.empty(shape)))
        self._rank = rank
        alpha = effective_alpha(alpha, rank)
        if shapes is None and args.rs_lora:
            alpha *= math.sqrt(rank)  # files have the alpha that gives the scale when it is divided by the rank
        self.register_buffer("alpha", torch.tensor(alpha))
        self.scale = self.own_scale()
        self.scalar = nn.Parameter(torch.zeros(())) if args.use_scalar and shapes is None else None
        if args.dora_wd:
            self.dora_scale = nn.Parameter(_norms(self._weight(), by_row=args.wd_on_output))
        self.register_load_state_dict_post_hook(_refresh)

    # ---- what a type defines

    @abstractmethod
    def tensor_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the trained tensors by their names in files."""

    @classmethod
    @abstractmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        """The rank of a file's entry."""

    @classmethod
    def product(cls, tensors: Mapping[str, Tensor], rows: slice = slice(None)) -> Tensor:
        """Some rows of the change, before scales: (rows, in, ...) or with all but the first axis flattened."""
        raise NotImplementedError(f"the change of {cls.__name__} is no product")

    def changed(self, x: Tensor, index: int, factor: float) -> Tensor:
        """``factor * op(x, change)`` for the rows of the `index`-th module."""
        return self.operate(x, self.delta(index) * factor)

    def squared_norms(self, index: int) -> Tensor:
        """Squared norms of the rows of the `index`-th module's weight with its change: (rows,)."""
        weight = self._live[index].weight.detach().to(self.alpha.dtype)
        return (weight + self.delta(index) * self.scale).flatten(1).square().sum(1)

    # ---- the layer

    @classmethod
    def rebuild(cls, modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], args: ChangeArgs) -> ChangeLayer:
        dora = tensors.get("dora_scale")
        by_row = dora is None or dora.shape[0] != 1
        args = replace(args, dora_wd=dora is not None, wd_on_output=by_row, use_scalar=False)
        own = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in ("alpha", "dora_scale")}
        alpha = tensors.get("alpha")
        layer = cls(modules, cls.rank_of(tensors), None if alpha is None else float(alpha), args, own)
        layer.load(tensors)
        return layer

    @property
    def rank(self) -> int:
        return self._rank

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors by their names in files, with the trained factor in."""
        found = {name: getattr(self, _attribute(name)) for name in self.names}
        if self.scalar is not None:
            found[self.scalar_name] = found[self.scalar_name] * self.scalar
        return found

    def delta(self, index: int) -> Tensor:
        """The rows of the `index`-th module, before the scale, in the shape of its weight."""
        start = sum(self.rows[:index])
        rows = slice(start, start + self.rows[index])
        return self.product(self.tensors(), rows).reshape(self.rows[index], *self.shape[1:])

    def operate(self, x: Tensor, weight: Tensor) -> Tensor:
        """The live module's operation with another weight, and without a bias."""
        return F.linear(x, weight) if self.geometry is None else F.conv2d(x, weight, **self.geometry)

    def adapt(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.alpha.dtype)  # the base may be stored in fewer bits than what is trained
        if self.args.dora_wd:
            change = self._decomposed(index, x, output) + self._bias(index)
            return output + self.multiplier * change.to(output.dtype)
        change = self.changed(x, index, self.multiplier * self.scale) + self._bias(index) * self.multiplier
        return output + self._dropped(change).to(output.dtype)

    def _bias(self, index: int) -> Tensor | float:
        """The change of the bias of the `index`-th module, to be added to outputs."""
        if BIAS not in self.names:
            return 0.0
        start, axis = sum(self.rows[:index]), [-1] if self.geometry is None else [-1, 1, 1]
        return self.diff_b[start : start + self.rows[index]].reshape(axis)

    def _decomposed(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        """The change of the output by a weight of trained norms: DoRA.

        ``W' = f (W + change)`` with ``f = dora_scale / (|W + change| + eps)``, so that with the bare output without
        its bias, ``y = W x``, the change is ``f (y + change x) - y``. Norms of columns need ``W (f x)`` in place of
        ``f y``.
        """
        module, eps = self._live[index], torch.finfo(self.alpha.dtype).eps
        axis = [-1] if self.geometry is None else [-1, 1, 1]
        bare = output if module.bias is None else output - module.bias.detach().reshape(axis).to(output.dtype)
        if self.args.wd_on_output:
            start = sum(self.rows[:index])
            magnitude = self.dora_scale[start : start + self.rows[index]].reshape(axis)
            f = magnitude / (self.squared_norms(index).sqrt().reshape(axis) + eps)
            return f * (bare + self._dropped(self.changed(x, index, self.scale))) - bare
        whole = self._weight() + self.product(self.tensors()).reshape(self.shape) * self.scale
        f = (self.dora_scale / (_norms(whole, by_row=False) + eps)).reshape(axis)
        scaled = x * f
        weight = module.weight.detach().to(scaled.dtype)
        return self.operate(scaled, weight) + self._dropped(self.changed(scaled, index, self.scale)) - bare

    def _dropped(self, change: Tensor) -> Tensor:
        """The outputs of the change after the dropouts. Masks rather than early returns: no graph breaks."""
        args, axis = self.args, -1 if self.geometry is None else 1
        if not self.training:
            return change
        if args.rank_dropout:
            shape = [1] * change.dim()
            shape[axis] = change.shape[axis]
            change = change * (torch.rand(shape, device=change.device) >= args.rank_dropout)
            if args.rank_dropout_scale:
                change = change / (1 - args.rank_dropout)
        if args.dropout:
            change = F.dropout(change, args.dropout)
        if args.module_dropout:
            change = change * (torch.rand((), device=change.device) >= args.module_dropout)
        return change

    def _weight(self) -> Tensor:
        """(rows of all modules, in, ...), in the dtype of what is trained."""
        return torch.cat([module.weight.detach().to(torch.get_default_dtype()) for module in self._live])

    # ---- files

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        own = {name: getattr(self, _attribute(name)) for name in self.names}
        if self.args.dora_wd:
            own["dora_scale"] = self.dora_scale
        given = {name: tensor for name, tensor in tensors.items() if name != "alpha"}
        hint = "give the --network_args and --network_dim of its training, or --dim_from_weights"
        if own.keys() != given.keys():
            raise UserError(f"the file has {', '.join(sorted(given))}, the network {', '.join(sorted(own))}", hint=hint)
        for name, tensor in given.items():
            if _squeezed(tensor.shape) != _squeezed(own[name].shape):
                shapes = f"shape {tuple(tensor.shape)} does not fit {tuple(own[name].shape)}"
                raise UserError(f"{name}: {shapes}; the file's rank is {self.rank_of(tensors)}", hint=hint)
        meta = {name: tensor.to("meta") for name, tensor in given.items()}
        if self.product(meta).numel() != self.shape.numel() or self.product(meta).shape[0] != self.shape[0]:
            raise UserError(f"shape {tuple(self.product(meta).shape)} does not fit {tuple(self.shape)}")
        for name, tensor in given.items():
            own[name].data.copy_(tensor.reshape(own[name].shape))
        alpha = tensors.get("alpha")
        self.alpha.fill_(effective_alpha(None if alpha is None else float(alpha), self.rank))
        self.scale = self.own_scale()
        if self.scalar is not None:
            self.scalar.data.fill_(1)

    def own_scale(self) -> float:
        """By what the product is multiplied: of `alpha` as files hold it, so that it is the same after a resume."""
        return float(self.alpha) / self.rank

    @classmethod
    def scale_of(cls, tensors: Mapping[str, Tensor]) -> float:
        """The scale of a file's entry."""
        rank, alpha = cls.rank_of(tensors), tensors.get("alpha")
        return effective_alpha(None if alpha is None else float(alpha), rank) / rank

    def file_state(self) -> dict[str, Tensor]:
        state = {"alpha": self.alpha, **{name: tensor.detach() for name, tensor in self.tensors().items()}}
        return {**state, "dora_scale": self.dora_scale.detach()} if self.args.dora_wd else state

    @classmethod
    def weight_change(cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor]) -> Tensor:
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        change = cls.product(tensors)
        if change.numel() != shape.numel() or change.shape[0] != shape[0]:
            raise UserError(f"shape {tuple(change.shape)} does not fit {tuple(shape)}")
        change = change.reshape(shape) * cls.scale_of(tensors)
        dora = tensors.get("dora_scale")
        if dora is None:
            return change
        base = weight()
        whole, eps = base + change, torch.finfo(torch.float32).eps
        norms = _norms(whole, by_row=dora.shape[0] != 1)
        return whole * (dora.reshape(norms.shape) / (norms + eps)) - base

    @classmethod
    def bias_change(cls, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return tensors[BIAS].float() if BIAS in tensors else None

    @torch.no_grad()
    def limit_norm(self, limit: float) -> None:
        norm = (self.product(self.tensors()).norm() * abs(self.scale)).clamp(min=limit / 2)
        own = [getattr(self, _attribute(name)) for name in self.names if name != BIAS]
        factor = (limit / norm).clamp(max=1) ** (1 / len(own))
        for tensor in own:
            tensor.mul_(factor.to(tensor.dtype))


def _refresh(layer: ChangeLayer, _keys: Any) -> None:
    """After a state dict is loaded: the scale follows from its alpha."""
    layer.scale = layer.own_scale()


def _attribute(name: str) -> str:
    """A tensor's name in files as one of a parameter."""
    return name.replace(".", "_")


def _squeezed(shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape[:2]) if len(shape) == 4 and shape[2:] == (1, 1) else tuple(shape)


def _norms(weight: Tensor, *, by_row: bool) -> Tensor:
    """Norms of rows (out, 1, ...), or of columns, which have all rows and the kernel in them, (1, in, ...)."""
    axis = 0 if by_row else 1
    others = [other for other in range(weight.dim()) if other != axis]
    return torch.linalg.vector_norm(weight, dim=others, keepdim=True)
