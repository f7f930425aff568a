"""How weights travel between CPU memory and a device: queues of copies that run beside the computation."""

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
        """What is computed from now on comes after the copy; this thread need not wait."""

    def wait(self) -> None:
        """Returns when the copy is done."""


class CopyStream(Protocol):
    """Copies that run one after another, beside the computation."""

    def copy(self, target: Tensor, source: Tensor, after: Iterable[CopyEvent | None] = ()) -> CopyEvent | None:
        """Copies as soon as what has been asked of the device until now, and all of `after`, are done."""


def make_copy_stream(device: torch.device, *, simulate: bool = False) -> CopyStream:
    """A lane to or from `device`. `simulate`: copies within CPU memory, each as late as it may be."""
    if simulate:
        return DelayedCopyStream()
    return _DeviceCopyStream(device) if device.type in ("cuda", "xpu") else _SynchronousCopies()


def host_buffer(size: int, device: torch.device) -> Tensor:
    """At least `size` bytes of CPU memory that `device` can reach by itself, uint8; see `release_host_buffer`."""
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
        LOGGER.warning("CPU memory cannot be pinned (%s); swapping blocks will be slower", error)
        _forget_error(device)
    return buffer


def release_host_buffer(buffer: Tensor, device: torch.device) -> None:
    """Takes the device's claim away. The memory itself lives as long as tensors use it."""
    if device.type == "cuda" and buffer.is_pinned():
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


def _forget_error(device: torch.device) -> None:
    """CUDA reports a failed call once more to whoever asks next, and that would be an innocent kernel."""
    with suppress(RuntimeError):
        torch.zeros(1, device=device)


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
    """For devices without streams: a copy is done, or in order with the computation, when `copy` returns."""

    @torch.no_grad()
    def copy(self, target: Tensor, source: Tensor, after: Iterable[CopyEvent | None] = ()) -> None:
        target.copy_(source)


class DelayedCopyStream:
    """The slowest lane there may be, for tests on any machine.

    A target is NaN from the moment its copy is asked for, and gets its values only when somebody waits for them. So a
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
        """Does the first `count` copies of all that were ever asked for."""
        while self._done < count:
            self._waiting.popleft()()
            self._done += 1


class _DelayedCopyEvent:
    def __init__(self, lane: DelayedCopyStream, number: int):
        self._lane, self._number = lane, number

    def before_use(self) -> None:
        self._lane.finish(self._number)

    wait = before_use
