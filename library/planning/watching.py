"""Memory as it is taken and given back: every storage of every tensor, from its birth to its death, by device and kind.

It sees the tensors that operations give, real ones and torch's fakes alike, so the same watcher predicts a run and
measures one. Memory that a kernel takes and frees inside itself is not seen.
"""

from __future__ import annotations

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
            self._see(result, func)
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

    def _see(self, tensor: Tensor, func: Any) -> _Storage | None:
        if tensor.layout != torch.strided or (tensor.device.type == "meta"):
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None:
            return known
        device = tensor.device.type
        one = _Storage(storage, self._ended)
        one.key, one.device, one.kind = key, device, self.kind
        one.size = -(-storage.nbytes() // GRAIN) * GRAIN
        self._alive[key] = one
        self._born += 1
        one.born = self._born
        now = self._now[device] = self._now.get(device, 0) + one.size
        kinds = self._kinds.setdefault(device, Counter())
        kinds[one.kind] += one.size
        peak = self._phase.peaks.setdefault(device, Peak())
        if now > peak.size:
            peak.size, peak.kinds, peak.operation, peak.moment = now, Counter(kinds), str(func), self._born
        return one

    def _ended(self, one: _Storage) -> None:
        del self._alive[one.key]
        self._now[one.device] -= one.size
        self._kinds[one.device][one.kind] -= one.size
