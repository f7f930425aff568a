"""Inputs of checkpointed blocks kept in CPU memory between the forward and the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

_SMALL = 1 << 20  # bytes; what every block is given, such as text, is not worth a journey for each


def offloading_checkpoint(device: torch.device, smallest: int = _SMALL) -> Callable[..., Any]:
    """A function for `enable_gradient_checkpointing`: ``(block, *inputs)`` to the block's output.

    The block's inputs of `smallest` bytes or more wait in CPU memory. On CUDA the copies run beside the computation,
    and while one block is computed again the input of the one before it is fetched. Results are the same to the bit.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    latest: list[weakref.ref[_Away]] = []  # at most one

    def pack(tensor: Tensor) -> Tensor | _Away:
        if tensor.nbytes < smallest or isinstance(tensor, nn.Parameter):
            return tensor
        away = _Away(tensor, stream, latest[0] if latest else None)
        latest[:] = [weakref.ref(away)]
        return away

    def unpack(kept: Tensor | _Away) -> Tensor:
        return kept.back() if isinstance(kept, _Away) else kept

    def run(block: nn.Module, *inputs: Any) -> Any:
        # Inside, checkpoint's own hooks rule; these see only the inputs, which it saves like any operation.
        with saved_tensors_hooks(pack, unpack):
            return checkpoint(block.__call__, *inputs, use_reentrant=False)

    return run


class _Away:
    """A tensor in CPU memory that knows which one will be wanted after it."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None, before: weakref.ref[_Away] | None):
        self._device, self._stream, self._before = tensor.device, stream, before
        self._fetched: Tensor | None = None
        if stream is None:
            self._host = tensor.detach().clone()
            return
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(stream)  # its memory must not be given away before it is copied

    def back(self) -> Tensor:
        """The tensor on its device; starts fetching the one before it."""
        if self._stream is None:
            return self._host
        self._fetch()
        tensor, self._fetched = self._fetched, None
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._arrived)
        tensor.record_stream(current)
        before = self._before and self._before()
        if before is not None:
            before._fetch()
        return tensor

    def _fetch(self) -> None:
        if self._fetched is not None:
            return
        with torch.cuda.stream(self._stream):
            self._fetched = self._host.to(self._device, non_blocking=True)
            self._arrived = self._stream.record_event()
