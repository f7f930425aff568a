"""The played counterpart of accelerate's Accelerator: one process on the device that is planned for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.planning.gpu import true_errors
from library.training.placement import WEIGHT_DTYPES
from library.training.precision import HalfGradScaler

if TYPE_CHECKING:
    from library.options.base import Options


class PlayedAccelerator:
    """What a run asks of accelerate, for one process. Make it inside the played machine."""

    process_index = 0
    num_processes = 1
    is_main_process = True

    def __init__(self, opts: Options, device: torch.device):
        self.device = device
        self._precision = opts.memory.mixed_precision
        self.scaler: torch.amp.GradScaler | None = None
        if self._precision == "fp16":
            kind = HalfGradScaler if opts.memory.full_fp16 else torch.amp.GradScaler
            self.scaler = kind(device.type)

    def autocast(self) -> AbstractContextManager[Any]:
        if self._precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=WEIGHT_DTYPES[self._precision])

    def backward(self, loss: Tensor) -> None:
        with true_errors():
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def clip_grad_norm_(self, parameters: list[Tensor], limit: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> PlayedOptimizer:
        return PlayedOptimizer(optimizer, self.scaler)

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        return tensor


class PlayedOptimizer:
    """What accelerate makes of an optimizer: the scaler of fp16 acts in its step."""

    step_was_skipped = False

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None):
        self.optimizer, self._scaler = optimizer, scaler

    def step(self) -> None:
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups
