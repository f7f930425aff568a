"""Asynchronous copies between CPU memory and a device, which run beside the computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from library.runtime.logs import LOGGER

_PAGE = 4096  # bytes
POISON = 0xFF  # a byte that makes NaN of every float format


class CopyEvent(Protocol):
    """Completion of an asynchronous copy."""

    def before_use(self) -> None:
        """Makes the device's computation from now on wait for the copy; this thread does not wait."""

    def wait(self) -> None:
        """Blocks until the copy is done."""


class CopyStream(Protocol):
    """Copies that run one after another, beside the computation."""

    def copy(self, target: Tensor, source: Tensor, after: Iterable[CopyEvent | None] = ()) -> CopyEvent | None:
        """Copies once the work that the device has been given so far, and all of `after`, are done."""


def make_copy_stream(device: torch.device, *, simulate: bool = False) -> CopyStream:
    """A stream of copies to or from `device`. `simulate`: copies within CPU memory, each as late as allowed."""
    if simulate:
        return DelayedCopyStream()
    return _DeviceCopyStream(device) if device.type in ("cuda", "xpu") else _SynchronousCopies()


def host_buffer(size: int, device: torch.device) -> Tensor:
    """At least `size` bytes of CPU memory, uint8; pinned on CUDA. Call `release_host_buffer` when done."""
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8)
    # torch's own pinned memory is rounded up to a power of two, which is up to twice what a block needs. Whole pages
    # are pinned, so a buffer shares none with another.
    size = -(-size // _PAGE) * _PAGE
    memory = torch.empty(size + _PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % _PAGE
    buffer = memory[start : start + size]
    try:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))
    except RuntimeError as error:
        LOGGER.warning("CPU memory cannot be pinned (%s); copies to the device will be slower", error)
        with suppress(RuntimeError):  # clears CUDA's last error, which the next kernel would report again
            torch.zeros(1, device=device)
    return buffer


def release_host_buffer(buffer: Tensor, device: torch.device) -> None:
    """Unpins the buffer. The memory itself lives as long as tensors use it."""
    if device.type == "cuda" and buffer.is_pinned():
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


class _DeviceCopyStream:
    def __init__(self, device: torch.device):
        self._device = device
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream(device)

    def copy(self, target: Tensor, source: Tensor, after: Iterable[CopyEvent | None] = ()) -> CopyEvent:
        self._stream.wait_stream(self._module.current_stream(self._device))
        for earlier in after:
            if isinstance(earlier, _DeviceCopyEvent):
                self._stream.wait_event(earlier.event)
        with self._module.stream(self._stream), torch.no_grad():
            target.copy_(source, non_blocking=True)
        return _DeviceCopyEvent(self._device, self._module, self._stream.record_event())


class _DeviceCopyEvent:
    def __init__(self, device: torch.device, module: Any, event: Any):
        self._device, self._module, self.event = device, module, event

    def before_use(self) -> None:
        self._module.current_stream(self._device).wait_event(self.event)

    def wait(self) -> None:
        self.event.synchronize()


class _SynchronousCopies:
    """Copies for devices without streams: done when `copy` returns, or queued in order with the computation."""

    @torch.no_grad()
    def copy(self, target: Tensor, source: Tensor, after: Iterable[CopyEvent | None] = ()) -> None:
        target.copy_(source)


class DelayedCopyStream:
    """The slowest stream of copies that is allowed, for tests on any machine.

    A target is NaN as soon as its copy is requested, and gets its values only when someone waits for them. So a
    missing wait, or memory that is used again too early, shows in the results.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._done = 0

    def copy(self, target: Tensor, source: Tensor, after: Iterable[CopyEvent | None] = ()) -> CopyEvent:
        for earlier in after:
            if earlier is not None:
                earlier.wait()
        with torch.no_grad():
            target.fill_(float("nan") if target.is_floating_point() else POISON)
        self._waiting.append(lambda: target.copy_(source))
        return _DelayedCopyEvent(self, self._done + len(self._waiting))

    @torch.no_grad()
    def finish(self, count: int) -> None:
        """Does the first `count` of all copies that were ever requested."""
        while self._done < count:
            self._waiting.popleft()()
            self._done += 1


class _DelayedCopyEvent:
    def __init__(self, stream: DelayedCopyStream, number: int):
        self._stream, self._number = stream, number

    def before_use(self) -> None:
        self._stream.finish(self._number)

    wait = before_use
