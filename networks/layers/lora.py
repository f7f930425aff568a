"""LoRA: the change of a weight as a product of two matrices of low rank (arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from networks.layer import AdapterLayer
from networks.layer_args import LoraArgs
from networks.layers import functional
from networks.layers.copies import cast_once
from networks.layers.outputs import OncePerInput
from networks.layers.product import add_product


class Entry(NamedTuple):
    """A layer in a file. Shapes as there; `alpha` is the rank where the file has none."""

    down: Tensor
    up: Tensor
    alpha: float

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Entry:
        """Raises: UserError: the matrices do not belong together."""
        down, up, alpha = tensors["lora_down.weight"], tensors["lora_up.weight"], tensors.get("alpha")
        if down.dim() not in (2, 4) or up.dim() not in (2, 4) or up.shape[1] != down.shape[0]:
            raise UserError(f"down {tuple(down.shape)} and up {tuple(up.shape)} do not belong together")
        return Entry(down, up, functional.effective_alpha(None if alpha is None else float(alpha), down.shape[0]))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def change(self) -> Tensor:
        """The weight change at multiplier 1, float32."""
        return functional.delta(self.down.float(), self.up.float()) * (self.alpha / self.rank)


def fitted(entry: Entry, down: Tensor | torch.Size, up: Tensor | torch.Size, rank: int) -> tuple[Tensor, Tensor]:
    """A file's matrices in the shapes of a layer's. Raises: UserError: another rank, or a layer of another size."""
    try:
        return functional.fit_kernel(entry.down, down), functional.fit_kernel(entry.up, up)
    except ValueError as error:
        hint = "give that --network_dim, or --dim_from_weights" if entry.rank != rank else None
        raise UserError(f"{error}; the file's rank is {entry.rank}", hint=hint) from error


class LoraLayer(AdapterLayer):
    """``output + multiplier * alpha / r * up(down(x))`` for one linear layer, convolution, or several fused linears.

    Fused linears share the down matrix; each takes its rows of the up matrix, in their order (and its own dropouts).
    All is tensor arithmetic on the layer's device: nothing waits, and torch.compile sees one graph.
    """

    reads_live = False
    shares_input = True

    def __init__(self, modules: Sequence[nn.Module], rank: int, alpha: float | None, args: LoraArgs):
        super().__init__()
        self.rows = [module.weight.shape[0] for module in modules]
        self.lora_down, self.lora_up = matrices(modules, rank, sum(self.rows))
        self.register_buffer("alpha", torch.tensor(functional.effective_alpha(alpha, rank)))
        self.scale = float(self.alpha) / rank
        self.dropout, self.rank_dropout, self.module_dropout = args.dropout, args.rank_dropout, args.module_dropout
        self._hidden = OncePerInput(len(modules))
        self.register_load_state_dict_post_hook(refresh_scale)

    @property
    def rank(self) -> int:
        return self.lora_down.weight.shape[0]

    def copied_weights(self) -> list[tuple[Tensor, Sequence[int]]]:
        return [(self.lora_down.weight, [self.rank]), (self.lora_up.weight, self.rows)]

    @classmethod
    def rebuild(cls, modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], args: LoraArgs) -> AdapterLayer:
        entry = Entry.of(tensors)
        layer = cls.build(modules, entry.rank, entry.alpha, args)
        layer.load(tensors)
        return layer

    def init_weights(self, rng: torch.Generator) -> None:
        """Down kaiming-uniform with a = sqrt(5), up zero: the network starts as the bare model."""
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5), generator=rng)
        nn.init.zeros_(self.lora_up.weight)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        entry = Entry.of(tensors)
        down, up = fitted(entry, self.lora_down.weight, self.lora_up.weight, self.rank)
        self.lora_down.weight.data.copy_(down)
        self.lora_up.weight.data.copy_(up)
        self.alpha.fill_(entry.alpha)
        self.scale = entry.alpha / self.rank

    @classmethod
    def weight_change(cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor]) -> Tensor:
        try:
            return functional.fit_kernel(Entry.of(tensors).change(), shape)
        except ValueError as error:
            raise UserError(str(error)) from error

    def adapt(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        return self._adapted(index, x, output, into=False)

    def adapt_into(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        return self._adapted(index, x, output, into=True)

    def _adapted(self, index: int, x: Tensor, output: Tensor, *, into: bool) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = cast_once(x, self.lora_down.weight.dtype)  # the base may be stored in fewer bits than what is trained
        down = self.lora_down.weight if self.copies is None else self.copies[0]
        hidden = self._hidden.of(x, partial(self._lowered, x, down), (x, down), index)
        factor = self.multiplier * self.scale
        if self.training:
            hidden, factor = self._drop(hidden, factor)
        up = self._up_of(index)
        if up.dim() == 2 and up.dtype == hidden.dtype == output.dtype:
            return add_product(output, hidden, up, factor, into=into)
        if factor != 1:
            hidden = hidden * factor  # and not the output, nor its gradient, which are many times as large
        change = F.linear(hidden, up) if up.dim() == 2 else F.conv2d(hidden, up)
        return output + change.to(output.dtype)

    def _lowered(self, x: Tensor, down: Tensor) -> Tensor:
        """``down(x)``; `down` are the weights, or a copy of them."""
        if isinstance(self.lora_down, nn.Linear):
            return F.linear(x, down)
        return self.lora_down._conv_forward(x, down, None)

    def _up_of(self, index: int) -> Tensor:
        if self.copies is not None:
            return self.copies[1 + index]
        up = self.lora_up.weight
        return up if len(self.rows) == 1 else up[self.rows_of(index)]

    def _drop(self, hidden: Tensor, factor: float) -> tuple[Tensor, float]:
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        if self.rank_dropout:
            axes = [1] * (hidden.dim() - 2)
            shape = (len(hidden), self.rank, *axes) if hidden.dim() == 4 else (len(hidden), *axes, self.rank)
            hidden = hidden * (torch.rand(shape, device=hidden.device) >= self.rank_dropout)
            factor /= 1 - self.rank_dropout
        if self.module_dropout:  # a mask rather than an early return: no graph break, and no rank waits for another
            hidden = hidden * (torch.rand((), device=hidden.device) >= self.module_dropout)
        return hidden, factor

    @torch.no_grad()
    def limit_norm(self, limit: float) -> None:
        down, up = self.lora_down.weight, self.lora_up.weight
        factor = functional.max_norm_factor(down, up, self.scale, limit)
        down.mul_(factor)
        up.mul_(factor)

    def fast_parameters(self) -> list[nn.Parameter]:
        return [self.lora_up.weight]


def refresh_scale(layer: AdapterLayer, _keys: Any) -> None:
    """After a state dict is loaded: the scale follows from its alpha."""
    layer.scale = float(layer.alpha) / layer.rank


def matrices(modules: Sequence[nn.Module], rank: int, rows: int) -> tuple[nn.Module, nn.Module]:
    """Down and up without values; drawing them must not touch the global random stream."""
    first = modules[0]
    if isinstance(first, nn.Linear):
        down = nn.utils.skip_init(nn.Linear, first.in_features, rank, bias=False)
        return down, nn.utils.skip_init(nn.Linear, rank, rows, bias=False)
    if isinstance(first, nn.Conv2d) and len(modules) == 1 and first.groups == 1:
        geometry = {name: getattr(first, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        down = nn.utils.skip_init(nn.Conv2d, first.in_channels, rank, first.kernel_size, bias=False, **geometry)
        return down, nn.utils.skip_init(nn.Conv2d, rank, rows, 1, bias=False)
    raise TypeError(f"LoRA cannot adapt {len(modules)} module(s) like {first}")
