"""Activation offloading: inputs of checkpointed blocks wait in CPU memory between forward and backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

_SMALL = 1 << 20  # bytes; smaller inputs, such as text that every block gets, are not worth a copy


def offloading_checkpoint(device: torch.device, smallest: int = _SMALL) -> Callable[..., Any]:
    """A function for `enable_gradient_checkpointing`: ``(block, *inputs)`` to the block's output.

    The block's inputs of `smallest` bytes or more wait in CPU memory. On a GPU the copies run beside the computation,
    and while one block is computed again the input of the one before it is fetched. Results are the same to the bit.
    """
    stream = None if device.type == "cpu" else torch.get_device_module(device).Stream(device)
    latest: list[weakref.ref[_OffloadedTensor]] = []  # at most one

    def pack(tensor: Tensor) -> Tensor | _OffloadedTensor:
        if tensor.nbytes < smallest or isinstance(tensor, nn.Parameter):
            return tensor
        offloaded = _OffloadedTensor(tensor, stream, latest[0] if latest else None)
        latest[:] = [weakref.ref(offloaded)]
        return offloaded

    def unpack(kept: Tensor | _OffloadedTensor) -> Tensor:
        return kept.restore() if isinstance(kept, _OffloadedTensor) else kept

    def run(block: nn.Module, *inputs: Any) -> Any:
        # Inside, checkpoint's own hooks apply; these see only the inputs, which it saves like any operation.
        with saved_tensors_hooks(pack, unpack):
            return checkpoint(block.__call__, *inputs, use_reentrant=False)

    return run


class _OffloadedTensor:
    """A tensor in CPU memory, and the one that is needed after it."""

    def __init__(self, tensor: Tensor, stream: torch.Stream | None, before: weakref.ref[_OffloadedTensor] | None):
        self._device, self._stream, self._before = tensor.device, stream, before
        self._module = None if stream is None else torch.get_device_module(tensor.device)
        self._fetched: Tensor | None = None
        if stream is None:
            self._host = tensor.detach().clone()
            return
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        stream.wait_stream(self._module.current_stream(tensor.device))
        with self._module.stream(stream):
            self._host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(stream)  # its memory must not be reused before it is copied

    def restore(self) -> Tensor:
        """The tensor on its device; starts to fetch the one before it."""
        if self._stream is None:
            return self._host
        self._fetch()
        tensor, self._fetched = self._fetched, None
        current = self._module.current_stream(self._device)
        current.wait_event(self._arrived)
        tensor.record_stream(current)
        before = self._before and self._before()
        if before is not None:
            before._fetch()
        return tensor

    def _fetch(self) -> None:
        if self._fetched is not None:
            return
        with self._module.stream(self._stream):
            self._fetched = self._host.to(self._device, non_blocking=True)
            self._arrived = self._stream.record_event()
