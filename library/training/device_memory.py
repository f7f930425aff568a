"""How much memory of the device a run has needed. Nothing here waits for the device."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

GB = 10**9


def peak_gb(device: torch.device) -> float | None:
    """The most that this process has had at once, in GB (10^9 bytes); of a CPU its memory. None: not known here."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).max_memory_allocated(device) / GB
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / GB  # the present amount: it keeps no peak
    return peak_of_process()


def peak_of_process() -> float | None:
    """The most CPU memory that this process has had at once, in GB (10^9 bytes); None: not known here."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        # Not getrusage's figure: Linux has a new process begin with that of the program that started it.
        return 1024 * int(status.partition("VmHWM:")[2].split()[0]) / GB
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GB


def free_share(device: torch.device) -> float | None:
    """The share of a GPU's memory that no program has; None: not known here."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free / total


def swapped_in() -> int:
    """Bytes that the machine has read back from its swap file since it was started; 0 where that is not known."""
    import psutil  # accelerate needs it

    try:
        return int(psutil.swap_memory().sin)
    except (OSError, RuntimeError):
        return 0
