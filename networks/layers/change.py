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
from networks.layers.functional import effective_alpha, fit_kernel
from networks.layers.magnitudes import LowRankSquares, RebuiltSquares, root
from networks.layers.outputs import OncePerInput, blended

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
            self._column_factors = OncePerInput(len(modules))
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

    @property
    def degree(self) -> int:
        """Where all tensors of the weight's change are multiplied by f, it is multiplied by f to this power."""
        return len(self.names) - (BIAS in self.names)

    def whole_change(self) -> Tensor:
        """The change of the weights of all modules together, in any shape."""
        return self.product(self.tensors()) * self.scale

    def pair(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        """Some rows of the change as a product (rows, r), (r, in * ...), where that costs less than the change itself.

        The second matrix is a convolution's kernel, flattened.
        """
        return None

    def changed(self, x: Tensor, index: int, factor: float) -> Tensor:
        """``factor * op(x, change)`` for the rows of the `index`-th module."""
        pair = self.pair(self.rows_of(index))
        if pair is None:
            return self.operate(x, self.delta(index) * factor)
        up, down = pair
        hidden = self.operate(x, down.reshape(-1, *self.shape[1:])) * factor
        return F.linear(hidden, up) if self.geometry is None else F.conv2d(hidden, up[..., None, None])

    # ---- the layer

    @classmethod
    def rebuild(cls, modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], args: ChangeArgs) -> ChangeLayer:
        dora = tensors.get("dora_scale")
        by_row = dora is None or dora.shape[0] != 1
        args = replace(args, dora_wd=dora is not None, wd_on_output=by_row)
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
        pieces = {name: self.pieces(name) for name in self.names}
        found = {name: own[0] if len(own) == 1 else torch.cat(own) for name, own in pieces.items()}
        if self.scalar is not None:
            found[self.scalar_name] = found[self.scalar_name] * self.scalar
        return found

    def pieces(self, name: str) -> list[nn.Parameter]:
        """The parameters that are one tensor in files, in the order of its rows."""
        return [getattr(self, _attribute(name))]

    def delta(self, index: int) -> Tensor:
        """The rows of the `index`-th module, before the scale, in the shape of its weight."""
        return self.product(self.tensors(), self.rows_of(index)).reshape(self.rows[index], *self.shape[1:])

    def operate(self, x: Tensor, weight: Tensor) -> Tensor:
        """The live module's operation with another weight, and without a bias."""
        return F.linear(x, weight) if self.geometry is None else F.conv2d(x, weight, **self.geometry)

    def adapt(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        own = x if torch.is_autocast_enabled(x.device.type) else x.to(self.alpha.dtype)  # the base may have fewer bits
        if not self.args.dora_wd:
            change = self._biased(self.changed(own, index, self.multiplier * self.scale), index, self.multiplier)
            return output + self._dropped(change).to(output.dtype)
        adapted = self._by_rows(index, own, output) if self.args.wd_on_output else self._by_columns(index, x, own)
        return blended(output, self._biased(adapted, index), self.multiplier)

    def _biased(self, outputs: Tensor, index: int, factor: float = 1.0) -> Tensor:
        """Outputs of the `index`-th module with ``factor * change`` of its bias, where that is trained."""
        if BIAS not in self.names:
            return outputs
        axis = [-1] if self.geometry is None else [-1, 1, 1]
        return outputs + self.diff_b[self.rows_of(index)].reshape(axis) * factor

    def _by_rows(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        """The outputs of a weight whose rows have trained norms: DoRA.

        ``W' = f (W + change)`` with ``f = dora_scale / (|W + change| + eps)``. `output` has the bias, which f leaves
        alone: it returns as ``(1 - f) bias``.
        """
        axis = [-1] if self.geometry is None else [-1, 1, 1]
        f = self._factors(self.dora_scale[self.rows_of(index)].flatten(), self._squares(index, axis=1)).reshape(axis)
        whole, bias = output + self._dropped(self.changed(x, index, self.scale)), self._live[index].bias
        return whole * f if bias is None else torch.addcmul((1 - f) * bias.detach().reshape(axis), whole, f)

    def _by_columns(self, index: int, x: Tensor, own: Tensor) -> Tensor:
        """The same with norms of columns, of the weights of all modules as one: ``W' x = (W + change) (f x)``."""
        scaled = own * self._column_factors.of(x, self._scales_of_columns)
        return self._live[index].forward(scaled.to(x.dtype)) + self._dropped(self.changed(scaled, index, self.scale))

    def _scales_of_columns(self) -> Tensor:
        squares = sum(self._squares(index, axis=0) for index in range(len(self.rows)))  # (in * kernel)
        f = self._factors(self.dora_scale.flatten(), squares.unflatten(0, (self.shape[1], -1)).sum(1))
        return f if self.geometry is None else f[:, None, None]

    @staticmethod
    def _factors(scales: Tensor, squares: Tensor) -> Tensor:
        return scales / (root(squares) + torch.finfo(scales.dtype).eps)

    def _squares(self, index: int, axis: int) -> Tensor:
        """Squares of the `index`-th module's weight with its change, flattened to two axes and summed over `axis`."""
        rows, weight = self.rows_of(index), self._live[index].weight.detach().flatten(1)
        pair = self.pair(rows)
        if pair is not None:
            up, down = pair
            factors = (weight, up, down) if axis == 1 else (weight.T, down.T, up.T)
            return LowRankSquares.apply(*factors, self.scale)
        own = {name: tensor for name, tensor in self.tensors().items() if name != BIAS}

        def build(*tensors: Tensor) -> Tensor:
            return self.product(dict(zip(own, tensors, strict=True)), rows).reshape(weight.shape)

        if torch.compiler.is_compiling():  # which decides itself what is kept and what is computed again
            return (weight + build(*own.values()) * self.scale).square().sum(axis)
        return RebuiltSquares.apply(build, weight, self.scale, axis, *own.values())

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
        own = {name: self.pieces(name) for name in self.names}
        if self.args.dora_wd:
            own["dora_scale"] = [self.dora_scale]
        given = {name: tensor for name, tensor in tensors.items() if name != "alpha"}
        hint = "give the --network_args and --network_dim of its training, or --dim_from_weights"
        if own.keys() != given.keys():
            raise UserError(f"the file has {', '.join(sorted(given))}, the network {', '.join(sorted(own))}", hint=hint)
        fitted = {}
        for name, tensor in given.items():
            shape = torch.Size((sum(map(len, own[name])), *own[name][0].shape[1:]))
            try:
                fitted[name] = fit_kernel(tensor, shape)
            except ValueError as error:
                raise UserError(f"{name}: {error}; the file's rank is {self.rank_of(tensors)}", hint=hint) from error
        meta = {name: tensor.to("meta") for name, tensor in given.items()}
        if self.product(meta).numel() != self.shape.numel() or self.product(meta).shape[0] != self.shape[0]:
            raise UserError(f"shape {tuple(self.product(meta).shape)} does not fit {tuple(self.shape)}")
        for name, tensor in fitted.items():
            for piece, part in zip(own[name], tensor.split([len(piece) for piece in own[name]]), strict=True):
                piece.data.copy_(part)
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
        factor = (limit / self.whole_change().norm()).clamp(max=1) ** (1 / self.degree)
        for tensor in (piece for name in self.names if name != BIAS for piece in self.pieces(name)):
            tensor.mul_(factor)


def _refresh(layer: ChangeLayer, _keys: Any) -> None:
    """After a state dict is loaded: the scale follows from its alpha."""
    layer.scale = layer.own_scale()


def _attribute(name: str) -> str:
    """A tensor's name in files as one of a parameter."""
    return name.replace(".", "_")


def _norms(weight: Tensor, *, by_row: bool) -> Tensor:
    """Norms of rows (out, 1, ...), or of columns, which have all rows and the kernel in them, (1, in, ...)."""
    axis = 0 if by_row else 1
    others = [other for other in range(weight.dim()) if other != axis]
    return torch.linalg.vector_norm(weight, dim=others, keepdim=True)
