"""DyLoRA: one training for every rank up to the network's; the first ranks of the file are a network of their own.

Source: Valipour et al. 2022 (arXiv:2210.07558). Each step trains one block of ranks, on top of those below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from networks.layer import AdapterLayer
from networks.layer_args import DyLoraArgs
from networks.layers import functional
from networks.layers.lora import Entry, LoraLayer, fitted, matrices, refresh_scale


class DyLoraLayer(AdapterLayer):
    """``output + multiplier * alpha / r * sqrt(r / n) * up[:, :n] @ down[:n] @ x``; n is r except while training.

    The matrices lie in blocks of `unit` ranks, which are parameters of their own: an optimizer leaves out the blocks
    that had no gradient in a step.
    """

    def __init__(self, modules: Sequence[nn.Module], rank: int, alpha: float | None, args: DyLoraArgs):
        super().__init__()
        if rank % args.unit:
            raise UserError(f"--network_args: unit={args.unit}: does not divide the rank, {rank}")
        down, up = matrices(modules, rank, modules[0].weight.shape[0])
        if len(modules) != 1:
            raise UserError("--network_module: networks.dylora cannot adapt this model: it has fused layers")
        self.unit = args.unit
        self.rows = [module.weight.shape[0] for module in modules]
        self.lora_A = nn.ParameterList(torch.split(down.weight.detach(), args.unit))
        self.lora_B = nn.ParameterList(torch.split(up.weight.detach(), args.unit, dim=1))
        self.geometry = None
        if isinstance(modules[0], nn.Conv2d):
            self.geometry = {name: getattr(modules[0], name) for name in ("stride", "padding", "dilation")}
        self.register_buffer("alpha", torch.tensor(functional.effective_alpha(alpha, rank)))
        self.scale = float(self.alpha) / rank
        self.register_load_state_dict_post_hook(refresh_scale)

    @property
    def rank(self) -> int:
        return self.unit * len(self.lora_A)

    def init_weights(self, rng: torch.Generator) -> None:
        """Down kaiming-uniform with a = sqrt(5), up zero: the network starts as the bare model."""
        whole = torch.empty(self.rank, *self.lora_A[0].shape[1:])
        nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=rng)
        self._fill(whole, torch.zeros(self.lora_B[0].shape[0], self.rank, *self.lora_B[0].shape[2:]))

    @classmethod
    def rebuild(cls, modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], args: DyLoraArgs) -> DyLoraLayer:
        entry = Entry.of(tensors)
        layer = cls(modules, entry.rank, entry.alpha, args)
        layer.load(tensors)
        return layer

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        entry, state = Entry.of(tensors), self.file_state()
        self._fill(*fitted(entry, state["lora_down.weight"], state["lora_up.weight"], self.rank))
        self.alpha.fill_(entry.alpha)
        self.scale = entry.alpha / self.rank

    @classmethod
    def weight_change(cls, tensors: Mapping[str, Tensor], shape: torch.Size, weight: Callable[[], Tensor]) -> Tensor:
        return LoraLayer.weight_change(tensors, shape, weight)

    def _fill(self, down: Tensor, up: Tensor) -> None:
        for parameter, part in zip(self.lora_A, torch.split(down, self.unit), strict=True):
            parameter.data.copy_(part)
        for parameter, part in zip(self.lora_B, torch.split(up, self.unit, dim=1), strict=True):
            parameter.data.copy_(part)

    def file_state(self) -> dict[str, Tensor]:
        down, up = torch.cat(list(self.lora_A)).detach(), torch.cat(list(self.lora_B), dim=1).detach()
        return {"lora_down.weight": down, "lora_up.weight": up, "alpha": self.alpha}

    def adapt(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A[0].dtype)  # the base may be stored in fewer bits than what is trained
        factor, block = self.multiplier * self.scale, len(self.lora_A) - 1
        downs, ups = list(self.lora_A), list(self.lora_B)
        if self.training:
            block = int(torch.randint(len(downs), ()))  # drawn on the CPU: nothing waits
            downs = [part.detach() for part in downs[:block]] + [downs[block]]
            ups = [part.detach() for part in ups[:block]] + [ups[block]]
            factor *= math.sqrt(len(self.lora_A) / (block + 1))
        down, up = torch.cat(downs), torch.cat(ups, dim=1)
        if self.geometry is None:
            change = F.linear(F.linear(x, down) * factor, up)
        else:
            change = F.conv2d(F.conv2d(x, down, **self.geometry) * factor, up)
        return output + change.to(output.dtype)

    @torch.no_grad()
    def limit_norm(self, limit: float) -> None:
        state = self.file_state()
        factor = functional.max_norm_factor(state["lora_down.weight"], state["lora_up.weight"], self.scale, limit)
        for parameter in self.parameters():
            parameter.mul_(factor)

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.lora_B)
