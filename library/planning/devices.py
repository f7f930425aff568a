"""The device that is there, measured; and its CPU memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from library.options.devices import BANDWIDTH_SHARE, MATRIX_SHARE, Device


def present_device() -> Device:
    """The device that a run without further words would use, measured; the CPU where there is no GPU."""
    if not torch.cuda.is_available():
        rate = _matrix_rate(torch.device("cpu"), 1024, torch.float32)
        return Device("this CPU", "cpu", cpu_memory(), 2e10, rate, 2e10, "a matrix product measured on this CPU")
    card = torch.device("cuda", torch.cuda.current_device())
    facts = torch.cuda.get_device_properties(card)
    rate = _matrix_rate(card, 8192, torch.bfloat16)
    bandwidth, bus = _copy_rates(card)
    # What is measured is reached, so the shares for public figures are taken back.
    return Device(
        facts.name,
        "gpu",
        facts.total_memory,
        bandwidth / BANDWIDTH_SHARE,
        rate / MATRIX_SHARE,
        bus,
        f"rates measured on this {facts.name}",
    )


def cpu_memory() -> int:
    """Bytes of CPU memory that are free to be used; where the system does not say, all of it."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def _matrix_rate(device: torch.device, side: int, dtype: torch.dtype) -> float:
    """Operations per second of a product of two square matrices: the best of three."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(_seconds(lambda: torch.mm(a, b), device) for _ in range(3 + 1))


def _copy_rates(device: torch.device) -> tuple[float, float]:
    """Bytes per second within the device, read and written, and to it from pinned memory."""
    size = 1 << 28
    here, there = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    inside = min(_seconds(lambda: there.copy_(here), device) for _ in range(3))
    across = min(_seconds(lambda: there.copy_(host, non_blocking=True), device) for _ in range(3))
    return 2 * size / inside, size / across


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
