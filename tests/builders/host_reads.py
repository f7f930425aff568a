"""Sees what a computation on an accelerator would wait for, on any machine."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Notes every operation that hands a tensor's value to Python: what would wait for an accelerator."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name.startswith(self.WAITING):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))
