"""Memory as it is taken and given back: every storage of every tensor, from its birth to its death, by device and kind.

It sees the tensors that operations give, real ones and torch's fakes alike, so the same watcher predicts a run and
measures one. Memory that a kernel takes and frees inside itself is not seen.

Autograd adds up the gradients of a tensor that is used several times. It does so in place where it alone holds the
first one, but never while operations are watched; then the sum takes the first one's place here, too.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

GRAIN = 512  # bytes: CUDA's caching allocator gives multiples of it
WORKING = "activations and working memory"  # the kind of what has no name yet


@dataclass
class Peak:
    """The most memory that was in use on a device during a phase."""

    size: int = 0  # bytes
    kinds: Counter[str] = field(default_factory=Counter)  # bytes by kind
    operation: str = ""  # that took the last piece
    moment: int = 0  # the number of storages that had been born

    def to_json(self) -> dict[str, Any]:
        kinds = {kind: size for kind, size in self.kinds.most_common() if size}
        return {"bytes": self.size, "by_kind": kinds, "operation": self.operation}


@dataclass
class Phase:
    """A stretch of a run. Devices by type, such as "cuda"."""

    name: str
    peaks: dict[str, Peak] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)  # bytes in use at its end


class _Storage(weakref.ref):
    """A storage that is alive; its end calls the watcher."""

    __slots__ = ("born", "device", "key", "kind", "size")


class Watcher(TorchDispatchMode):
    """Watches all storages that are born while it is active, and those it is shown.

    Args:
        counted: is called with each operation, its arguments and what it gives.
    """

    def __init__(self, counted: Callable[[Any, tuple, dict, Any], None] | None = None):
        super().__init__()
        self.phases: list[Phase] = []
        self._counted = counted
        self._alive: dict[int, _Storage] = {}  # by the address of the storage
        self._born = 0
        self._now: dict[str, int] = {}
        self._kinds: dict[str, Counter[str]] = {}
        self.kind = WORKING  # of what is born now
        self._unsettled: tuple[_Storage, str] | None = None  # the first summand of a sum of gradients, while it lives
        self._phase = self._open("before")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's own way of skipping it takes time

    # ---- what is asked

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """What happens inside belongs to a phase of its own."""
        before, self._phase = self._phase, self._open(name)
        self.phases.append(self._phase)
        try:
            yield self._phase
        finally:
            self._settle()
            self._phase.left = dict(self._now)
            self._phase = before

    def _open(self, name: str) -> Phase:
        peaks = {d: Peak(size, Counter(self._kinds[d]), "", self._born) for d, size in self._now.items()}
        return Phase(name, peaks)

    def in_use(self, device: str) -> int:
        """Bytes in use on a device."""
        return self._now.get(device, 0)

    def kinds(self, device: str) -> Counter[str]:
        """Bytes in use by kind."""
        return Counter(self._kinds.get(device, {}))

    def name(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Says what the memory of some tensors is for, also of those that were born before the watching began."""
        for tensor in tensors:
            if tensor is None:
                continue
            one = self._see(tensor, "")
            if one is None or one.kind == kind:
                continue
            for counts, moment in ((self._kinds[one.device], None), *self._peaks_of(one.device)):
                if moment is None or one.born <= moment:
                    counts[one.kind] -= one.size
                    counts[kind] += one.size
            one.kind = kind

    def _peaks_of(self, device: str) -> list[tuple[Counter[str], int]]:
        peak = self._phase.peaks.get(device)
        return [] if peak is None else [(peak.kinds, peak.moment)]

    # ---- what is seen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = self.run(func, args, kwargs)
        if isinstance(result, Tensor):
            summand = args[0] if func is torch.ops.aten.add.Tensor and _called_by_autograd() else None
            self._see(result, func, summand)
        elif isinstance(result, (list, tuple)):
            for one in tree_iter(result):
                if isinstance(one, Tensor):
                    self._see(one, func)
        if self._counted is not None:
            self._counted(func, args, kwargs, result)
        return result

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Computes an operation."""
        return func(*args, **kwargs)

    def _see(self, tensor: Tensor, func: Any, summand: Tensor | None = None) -> _Storage | None:
        if tensor.layout != torch.strided or (tensor.device.type == "meta"):
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None:
            return known
        self._settle()
        device = tensor.device.type
        one = _Storage(storage, self._ended)
        one.key, one.device, one.kind = key, device, self.kind
        one.size = -(-storage.nbytes() // GRAIN) * GRAIN
        self._alive[key] = one
        self._born += 1
        one.born = self._born
        self._now[device] = self._now.get(device, 0) + one.size
        kinds = self._kinds.setdefault(device, Counter())
        kinds[one.kind] += one.size
        replaced = None if summand is None else self._alive.get(summand.untyped_storage()._cdata)
        if replaced is not None and (replaced.device, replaced.size) == (device, one.size):
            self._unsettled = replaced, str(func)
        else:
            self._raise_peak(device, str(func))
        return one

    def _raise_peak(self, device: str, operation: str) -> None:
        peak, now = self._phase.peaks.setdefault(device, Peak()), self._now[device]
        if now > peak.size:
            peak.size, peak.kinds, peak.moment = now, Counter(self._kinds[device]), self._born
            peak.operation = operation

    def _settle(self) -> None:
        """Counts a sum and its first summand as two, since that one lives on."""
        if self._unsettled is not None:
            (replaced, operation), self._unsettled = self._unsettled, None
            self._raise_peak(replaced.device, operation)

    def _ended(self, one: _Storage) -> None:
        if self._unsettled is not None and self._unsettled[0] is one:
            self._unsettled = None
        else:
            self._settle()
        del self._alive[one.key]
        self._now[one.device] -= one.size
        self._kinds[one.device][one.kind] -= one.size


def _called_by_autograd() -> bool:
    """Whether the operation that is dispatched comes from autograd's engine, and not from a function in Python."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name == "__torch_dispatch__":
        frame = frame.f_back
    return frame is None or frame.f_code.co_name == "_engine_run_backward"  # its threads have no frame
