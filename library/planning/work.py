"""What operations cost: matrix products and bytes, from which a device's figures make seconds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from library.options.devices import BANDWIDTH_SHARE, LAUNCH, MATRIX_SHARE, Device

_NARROW = (torch.bfloat16, torch.float16)
_FULL_SHARE = 0.25  # of the bf16 rate, in float32: by default cards compute it without their matrix units


@dataclass
class Work:
    """What the operations of a phase cost on the device."""

    device: Device
    flops: int = 0
    operations: int = 0  # launches
    seconds: float = 0.0  # of the device, one operation after the other
    bytes_to_device: int = 0
    bytes_to_cpu: int = 0

    def count(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        """Adds an operation."""
        is_view, formula = _facts(func)
        if is_view:
            return
        outputs = [
            one for one in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(one, Tensor)
        ]
        if not outputs:
            return
        inputs = [one for one in args if isinstance(one, Tensor)]
        for one in args:
            if isinstance(one, (list, tuple)):
                inputs += [tensor for tensor in one if isinstance(tensor, Tensor)]
        target = outputs[0].device.type
        sources = {tensor.device.type for tensor in inputs if tensor.dim()}
        if len(sources | {target}) > 1 and self.device.kind in sources | {target}:
            if target == self.device.kind:
                self.bytes_to_device += outputs[0].nbytes
            else:
                self.bytes_to_cpu += outputs[0].nbytes
            return
        if target != self.device.kind:
            return
        self.operations += 1
        moved = sum(tensor.nbytes for tensor in inputs) + sum(tensor.nbytes for tensor in outputs)
        seconds = moved / (self.device.bandwidth * BANDWIDTH_SHARE)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result)
            self.flops += flops
            share = 1.0 if self.device.kind == "cpu" or inputs[0].dtype in _NARROW else _FULL_SHARE
            seconds = max(seconds, flops / (self.device.rate * MATRIX_SHARE * share))
        self.seconds += seconds

    @property
    def time(self) -> float:
        """Seconds: what is slowest of the device, the host that launches, and the bus; they run beside each other."""
        launching = self.operations * LAUNCH
        return max(self.seconds, launching, max(self.bytes_to_device, self.bytes_to_cpu) / self.device.bus)


@cache
def _facts(func: Any) -> tuple[bool, Any]:
    costs_nothing = getattr(func, "is_view", False) or "empty" in str(func)
    return bool(costs_nothing), flop_registry.get(getattr(func, "_overloadpacket", None))
