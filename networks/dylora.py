"""DyLoRA: one training for every rank up to the network's; the first ranks of the file are a network of their own.

Source: Valipour et al. 2022 (arXiv:2210.07558). Each step trains one block of ranks, on top of those below it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from networks import functional, lora
from networks.base import AdapterLayer
from networks.dylora_args import DyLoraArgs, parse, require_one_rank
from networks.lora import load as load
from networks.lora_files import read as read

if TYPE_CHECKING:
    from library.types import LoraTarget, Models
    from networks.lora_files import Entry, LoraFile


class DyLoraLayer(AdapterLayer):
    """``output + multiplier * alpha / r * sqrt(r / n) * up[:, :n] @ down[:n] @ x``; n is r except while training.

    The matrices lie in blocks of `unit` ranks, which are parameters of their own: an optimizer leaves out the blocks
    that had no gradient in a step.
    """

    def __init__(self, modules: Sequence[nn.Module], rank: int, alpha: float | None, args: DyLoraArgs):
        super().__init__()
        if rank % args.unit:
            raise UserError(f"--network_args: unit={args.unit}: does not divide the rank, {rank}")
        down, up = lora.matrices(modules, rank, modules[0].weight.shape[0])
        if len(modules) != 1:
            raise UserError("--network_module: networks.dylora cannot adapt this model: it has fused layers")
        self.unit = args.unit
        self.lora_A = nn.ParameterList(torch.split(down.weight.detach(), args.unit))
        self.lora_B = nn.ParameterList(torch.split(up.weight.detach(), args.unit, dim=1))
        self.geometry = None
        if isinstance(modules[0], nn.Conv2d):
            self.geometry = {name: getattr(modules[0], name) for name in ("stride", "padding", "dilation")}
        self.register_buffer("alpha", torch.tensor(functional.effective_alpha(alpha, rank)))
        self.scale = float(self.alpha) / rank
        self.register_load_state_dict_post_hook(_refresh_scale)

    @property
    def rank(self) -> int:
        return self.unit * len(self.lora_A)

    def initialise(self, rng: torch.Generator) -> None:
        """Down kaiming-uniform with a = sqrt(5), up zero: the network starts as the bare model."""
        whole = torch.empty(self.rank, *self.lora_A[0].shape[1:])
        nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=rng)
        self._fill(whole, torch.zeros(self.lora_B[0].shape[0], self.rank, *self.lora_B[0].shape[2:]))

    def load(self, key: str, entry: Entry) -> None:
        """Takes over a file's values. Raises: UserError: another rank, or a layer of another size."""
        state = self.file_state()
        try:
            down = functional.fit_kernel(entry.down, state["lora_down.weight"])
            up = functional.fit_kernel(entry.up, state["lora_up.weight"])
        except ValueError as error:
            hint = "give that --network_dim, or --dim_from_weights" if entry.rank != self.rank else None
            raise UserError(f"{key}: {error}; the file's rank is {entry.rank}", hint=hint) from error
        self._fill(down, up)
        self.alpha.fill_(entry.alpha)
        self.scale = entry.alpha / self.rank

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
            parameter.mul_(factor.to(parameter.dtype))

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.lora_B)


def _refresh_scale(layer: DyLoraLayer, _keys: object) -> None:
    layer.scale = float(layer.alpha) / layer.rank


def create(
    targets: Sequence[LoraTarget],
    models: Models,
    *,
    dim: int,
    alpha: float | None,
    dropout: float | None,
    args: Mapping[str, str],
    seed: int,
) -> lora.LoraNetwork:
    """As `networks.lora.create`. Raises: UserError: also for a rank that `unit` does not divide, or a dropout."""
    parsed = replace(_parsed(args, dropout), conv_alpha=functional.effective_alpha(alpha, dim))
    require_one_rank(parsed, dim)
    return lora.build(targets, models, parsed, DyLoraLayer, dim=dim, alpha=alpha, seed=seed)


def from_weights(
    targets: Sequence[LoraTarget],
    models: Models,
    file: LoraFile,
    *,
    dropout: float | None,
    args: Mapping[str, str],
) -> lora.LoraNetwork:
    """As `networks.lora.from_weights`."""
    return lora.rebuild(targets, models, file, _parsed(args, dropout), DyLoraLayer)


def _parsed(args: Mapping[str, str], dropout: float | None) -> DyLoraArgs:
    if dropout:
        raise UserError("--network_dropout: networks.dylora has none, it leaves out ranks instead")
    return parse(args)
