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
        weight, args = self._live[index].weight, self.args
        dropped = self.training and (args.rank_dropout or args.module_dropout)
        if self.geometry is not None or dropped or not isinstance(weight, nn.Parameter):
            return super().adapt(index, x, output)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.alpha.dtype)
        change = DifferentLinear.apply(*in_computing_dtype(x, self.diffs[index]), weight.detach(), self.multiplier)
        return output.detach() + self._biased(change, index, self.multiplier).to(output.dtype)

    @classmethod
    def weight_change(cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor]) -> Tensor:
        return super().weight_change(tensors, shape, weight) if "diff" in tensors else torch.zeros(shape)

    def file_state(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in super().file_state().items() if name != "alpha"}


class DifferentLinear(torch.autograd.Function):
    """``factor * diff x`` whose input has the gradient of ``(weight + factor * diff) x``.

    Two products are one in the backward pass, and the output of the frozen weight needs no gradient. In the forward
    pass they stay apart: in fewer bits than float32 the sum of both weights would lose most of `diff`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, diff: Tensor, weight: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x, diff, weight)
        ctx.factor = factor
        change = F.linear(x, diff)
        return change if factor == 1 else change * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, diff, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:  # first, so that the sum of the weights is gone when the gradient of `diff` is made
            grad_x = gradient @ torch.add(weight, diff, alpha=ctx.factor).to(gradient.dtype)
        grad_diff = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        return grad_x, grad_diff if ctx.factor == 1 else grad_diff * ctx.factor, None, None


class NormLayer(AdapterLayer):
    """``w_norm`` is added to the weight of a layer norm or group norm, ``b_norm`` to its bias."""

    def __init__(self, modules: Sequence[nn.Module], rank: int, alpha: float | None, args: ChangeArgs):
        super().__init__()
        self._live = list(modules)
        self.rows = [modules[0].weight.shape[0]]
        self.w_norm = nn.Parameter(torch.zeros_like(modules[0].weight, dtype=torch.get_default_dtype(), device="cpu"))
        self.b_norm = None if modules[0].bias is None else nn.Parameter(torch.zeros_like(self.w_norm))
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
        module, x = self._live[0], x.to(self.w_norm.dtype)
        weight = self.w_norm * self.multiplier
        bias = None if self.b_norm is None else self.b_norm * self.multiplier
        if isinstance(module, nn.GroupNorm):
            change = F.group_norm(x, module.num_groups, weight, bias, module.eps)
        else:
            change = F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
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
