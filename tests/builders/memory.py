"""How much CPU memory a piece of work takes, as Linux tells it."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest

needs_linux = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK) or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="memory is measured as Linux with glibc tells it",
)


def most_memory(work: Callable[[], object]) -> int:
    """Bytes of CPU memory that `work` takes at its height, beyond what is in use before."""

    def kilobytes(name: str) -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be handed out again unnoticed
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the height counts from now on
    before = kilobytes("VmRSS")
    work()
    return 1024 * (kilobytes("VmHWM") - before)
