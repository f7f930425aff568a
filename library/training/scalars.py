"""Reads scalars from the device without making it wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number is infinite or NaN; of weights sharded over processes, in this one's shard. Waits for them."""
    shares = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    return all(bool(share.detach().isfinite().all()) for share in shares)


class ScalarQueue:
    """Numbers on their way from the device. `push` starts a copy; `ready` gives what has arrived, in order."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, list[str], Tensor, Any]] = deque()

    def push(self, step: int, values: dict[str, Tensor]) -> None:
        stacked = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        if stacked.is_cuda:
            host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            host.copy_(stacked, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._waiting.append((step, list(values), host, event))
        else:
            self._waiting.append((step, list(values), stacked, None))

    def ready(self, wait: bool = False) -> list[tuple[int, dict[str, float]]]:
        """The values that have arrived, or with `wait` all that were pushed."""
        arrived = []
        while self._waiting:
            step, names, host, event = self._waiting[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    break
            self._waiting.popleft()
            arrived.append((step, dict(zip(names, host.tolist(), strict=True))))
        return arrived
