"""Differences of whole weights: of linear layers and convolutions (LyCORIS' full), and of norms (train_norm)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from networks.layer import AdapterLayer
from networks.layer_args import ChangeArgs
from networks.layers.change import BIAS, ChangeLayer
from networks.layers.functional import in_computing_dtype
from networks.layouts import SET_WEIGHT


class FullLayer(ChangeLayer):
    """``diff`` is added to the weight, ``diff_b`` to the bias."""

    def __init__(self, modules: Sequence[nn.Module], rank: int, alpha: float | None, args: ChangeArgs, shapes=None):
        super().__init__(modules, 1, 1.0, args, shapes)
        # One parameter for each module, in its shape: the gradient of a slice would be as large as the whole.
        self.diffs = nn.ParameterList(torch.empty(module.weight.shape) for module in modules)
        del self.diff

    def pieces(self, name: str) -> list[nn.Parameter]:
        return list(self.diffs) if name == "diff" else super().pieces(name)

    def delta(self, index: int) -> Tensor:
        return self.diffs[index]

    def tensor_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        biased = {BIAS: (self.shape[0],)} if self._live[0].bias is not None else {}
        return {"diff": tuple(self.shape), **biased}

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        return 1

    @classmethod
    def product(cls, tensors: Mapping[str, Tensor], rows: slice = slice(None)) -> Tensor:
        return tensors["diff"][rows]

    def init_weights(self, rng: torch.Generator) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    @classmethod
    def rebuild(cls, modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], args: ChangeArgs) -> ChangeLayer:
        if "diff" not in tensors:  # only the bias differs
            tensors = {"diff": torch.zeros_like(torch.cat([module.weight for module in modules])), **tensors}
        return super().rebuild(modules, tensors, args)

    def adapt(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        if not self._is_plain(index):
            return super().adapt(index, x, output)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.alpha.dtype)
        weight, diff = self._live[index].weight.detach(), self.diffs[index]
        change = DifferentLinear.apply(*in_computing_dtype(x, diff), weight, None, self.multiplier, False)
        return output.detach() + self._biased(change, index, self.multiplier).to(output.dtype)

    def instead(self, index: int, x: Tensor) -> Tensor | None:
        narrow = torch.is_autocast_enabled(x.device.type)  # in fewer bits the sum of both weights would lose of `diff`
        if narrow or not self.training or torch.compiler.is_compiling() or not self._is_plain(index):
            return None
        module = self._live[index]
        bias = None if module.bias is None else module.bias.detach().to(self.alpha.dtype)
        if BIAS in self.names:
            bias = bias + self.diff_b[self.rows_of(index)] * self.multiplier
        given = x.to(self.alpha.dtype), self.diffs[index], module.weight.detach(), bias
        return DifferentLinear.apply(*given, self.multiplier, True).to(x.dtype)

    def _is_plain(self, index: int) -> bool:
        """Whether the live module is a linear layer whose weight can be read, and nothing is dropped."""
        dropped = self.training and (self.args.rank_dropout or self.args.module_dropout)
        return self.geometry is None and not dropped and isinstance(self._live[index].weight, nn.Parameter)

    @classmethod
    def weight_change(cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor]) -> Tensor:
        return super().weight_change(tensors, shape, weight) if "diff" in tensors else torch.zeros(shape)

    def file_state(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in super().file_state().items() if name != "alpha"}


class DifferentLinear(torch.autograd.Function):
    """``(weight + factor * diff) x + bias``, or ``factor * diff x`` whose input has the gradient of both products.

    Nothing of the weights' size is kept. The second form is for fewer bits than float32, in which the sum of both
    weights would lose most of `diff`; the output of the frozen weight then needs no gradient of its own.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, diff: Tensor, weight: Tensor, bias: Tensor | None, factor: float, together: bool
    ) -> Tensor:
        """`together`: the first form. Only there is a bias."""
        ctx.save_for_backward(x, diff, weight)
        ctx.factor = factor
        if together:
            return F.linear(x, torch.add(weight, diff, alpha=factor), bias)
        change = F.linear(x, diff)
        return change if factor == 1 else change * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, Tensor | None, None, None]:
        x, diff, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:  # first, so that the sum of the weights is gone when the gradient of `diff` is made
            grad_x = gradient @ torch.add(weight, diff, alpha=ctx.factor).to(gradient.dtype)
        rows = gradient.flatten(0, -2)
        grad_diff = rows.T @ x.flatten(0, -2)
        grad_bias = rows.sum(0) if ctx.needs_input_grad[3] else None
        return grad_x, grad_diff if ctx.factor == 1 else grad_diff * ctx.factor, None, grad_bias, None, None


class NormLayer(AdapterLayer):
    """``w_norm`` is added to the weight of a layer norm or group norm, ``b_norm`` to its bias."""

    def __init__(self, modules: Sequence[nn.Module], rank: int, alpha: float | None, args: ChangeArgs):
        super().__init__()
        self._live = list(modules)
        self.rows = [modules[0].weight.shape[0]]
        self.w_norm = nn.Parameter(torch.zeros_like(modules[0].weight, dtype=torch.get_default_dtype(), device="cpu"))
        self.b_norm = None if _bias(modules[0]) is None else nn.Parameter(torch.zeros_like(self.w_norm))
        self._module_dropout = args.module_dropout

    @classmethod
    def rebuild(cls, modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], args: ChangeArgs) -> NormLayer:
        layer = cls(modules, 1, None, args)
        layer.load(tensors)
        return layer

    @property
    def rank(self) -> int:
        return 1

    def init_weights(self, rng: torch.Generator) -> None:
        """Zeros: nothing is changed yet."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        own = {"w_norm": self.w_norm} if self.b_norm is None else {"w_norm": self.w_norm, "b_norm": self.b_norm}
        for name, tensor in tensors.items():
            if name not in own or tensor.shape != own[name].shape:
                raise UserError(f"{name}: shape {tuple(tensor.shape)} does not fit {tuple(self.w_norm.shape)}")
            own[name].data.copy_(tensor)

    def adapt(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        bias = None if self.b_norm is None else self.b_norm * self.multiplier
        change = _normed(self._live[0], x.to(self.w_norm.dtype), self.w_norm * self.multiplier, bias)
        if self.training and self._module_dropout:
            change = change * (torch.rand((), device=change.device) >= self._module_dropout)
        return output + change.to(output.dtype)

    @classmethod
    def weight_change(cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor]) -> Tensor:
        if "w_norm" not in tensors:  # only the bias differs
            return torch.zeros(shape)
        if tensors["w_norm"].shape != shape:
            raise UserError(f"w_norm: shape {tuple(tensors['w_norm'].shape)} does not fit {tuple(shape)}")
        return tensors["w_norm"].float()

    @classmethod
    def bias_change(cls, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return tensors["b_norm"].float() if "b_norm" in tensors else None

    @torch.no_grad()
    def limit_norm(self, limit: float) -> None:
        norm = self.w_norm.float().norm()
        for parameter in self.parameters():
            parameter.mul_((limit / norm).clamp(max=1))


class ReplacedNormLayer(AdapterLayer):
    """``set_weight`` takes the place of a norm's weight: wholly at every multiplier but 0, as in other programs."""

    def __init__(self, modules: Sequence[nn.Module], rank: int, alpha: float | None, args: ChangeArgs):
        super().__init__()
        self._live = list(modules)
        self.rows = [modules[0].weight.shape[0]]
        self.set_weight = nn.Parameter(torch.empty(self.rows, dtype=torch.get_default_dtype()))

    @classmethod
    def rebuild(cls, modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], args: ChangeArgs) -> AdapterLayer:
        layer = cls(modules, 1, None, args)
        layer.load(tensors)
        return layer

    @property
    def rank(self) -> int:
        return 1

    def init_weights(self, rng: torch.Generator) -> None:
        with torch.no_grad():
            self.set_weight.copy_(self._live[0].weight)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        _require_replacement(tensors, self.set_weight.shape)
        self.set_weight.data.copy_(tensors[SET_WEIGHT])

    def adapt(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        if not self.multiplier:
            return output
        module = self._live[0]
        return _normed(module, x.to(self.set_weight.dtype), self.set_weight, _bias(module)).to(output.dtype)

    @classmethod
    def weight_change(cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor]) -> Tensor:
        _require_replacement(tensors, shape)
        return tensors[SET_WEIGHT].float() - weight()

    @classmethod
    def merged_change(
        cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor], multiplier: float
    ) -> Tensor:
        return cls.weight_change(tensors, shape, weight) * (multiplier != 0)

    def limit_norm(self, limit: float) -> None:
        """Nothing: what is limited is a change."""


def _bias(norm: nn.Module) -> Tensor | None:
    return getattr(norm, "bias", None)  # RMSNorm has no such attribute


def _require_replacement(tensors: Mapping[str, Tensor], shape: torch.Size) -> None:
    if tensors[SET_WEIGHT].shape != shape:
        raise UserError(f"{SET_WEIGHT}: shape {tuple(tensors[SET_WEIGHT].shape)} does not fit {tuple(shape)}")


def _normed(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The live norm's operation with another weight and bias, in the dtype of `x`."""
    bias = None if bias is None else bias.to(x.dtype)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, weight, bias, module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, weight, module.eps)
    return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
