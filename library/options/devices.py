"""GPUs by their makers' public figures, for planning runs. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from library.errors import UserError
from library.options.nearest import did_you_mean

GIB = 2**30
# Of public rates, what large operations reach on real cards. Small ones are bound by their launches.
MATRIX_SHARE, BANDWIDTH_SHARE = 0.8, 0.8
LAUNCH = 8e-6  # seconds of the host for an operation: PyTorch's own overhead in eager mode
# Device memory that no tensor shows: CUDA's context, the libraries' kernels and workspaces.
CUDA_OVERHEAD = GIB // 2


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a device."""

    name: str
    kind: str  # "gpu" or "cpu"
    memory: int  # bytes
    bandwidth: float  # bytes per second, of its own memory
    rate: float  # operations per second of bf16 matrix products, without sparsity
    bus: float  # bytes per second from CPU memory
    basis: str  # where the figures come from

    @property
    def overhead(self) -> int:
        """Bytes that no tensor shows."""
        return CUDA_OVERHEAD if self.kind == "gpu" else 0

    def with_memory(self, memory: int) -> Device:
        """The same device with another amount of memory, in bytes."""
        return replace(self, memory=memory)


# Name: GB of memory, GB/s of its memory, TFLOP/s of dense bf16 products with float32 sums, GB/s of the bus as copies
# from pinned memory reach it (PCIe 3.0 x16 and 4.0 x8: 12, 4.0 x16: 25, 5.0 x16: 50). By the makers' data sheets.
_TABLE = {
    "RTX 3060": (12, 360, 25.5, 25),
    "RTX 3060 Ti": (8, 448, 32.4, 25),
    "RTX 3070": (8, 448, 40.6, 25),
    "RTX 3080": (10, 760, 59.5, 25),
    "RTX 3090": (24, 936, 71.0, 25),
    "RTX 4060": (8, 272, 30.2, 12),
    "RTX 4060 Ti 16GB": (16, 288, 44.1, 12),
    "RTX 4070": (12, 504, 58.3, 25),
    "RTX 4070 Ti": (12, 504, 80.2, 25),
    "RTX 4080": (16, 717, 97.5, 25),
    "RTX 4090": (24, 1008, 165.2, 25),
    "RTX 5070": (12, 672, 61.7, 50),
    "RTX 5070 Ti": (16, 896, 87.9, 50),
    "RTX 5080": (16, 960, 112.6, 50),
    "RTX 5090": (32, 1792, 209.5, 50),
    "RTX A4000": (16, 448, 76.7, 25),
    "RTX A5000": (24, 768, 111.1, 25),
    "RTX A6000": (48, 768, 154.8, 25),
    "RTX 6000 Ada": (48, 960, 364.2, 25),
    "L4": (24, 300, 121.0, 12),
    "L40S": (48, 864, 362.0, 25),
    "A10": (24, 600, 125.0, 25),
    "A100 40GB": (40, 1555, 312.0, 25),
    "A100 80GB": (80, 2039, 312.0, 25),
    "H100": (80, 3350, 989.0, 50),
    "H200": (141, 4800, 989.0, 50),
}
# The card whose figures stand for one of which only the memory is known.
_TYPICAL = ("RTX 4060", "RTX 3080", "RTX 3060", "RTX 4080", "RTX 4090", "RTX 5090", "RTX A6000", "H100", "H200")


def device_named(name: str) -> Device:
    """A device of the table; case and spaces do not matter. Raises: UserError: it is not there."""
    plain = {_plain(known): known for known in _TABLE}
    found = plain.get(_plain(name).removeprefix("nvidia").removeprefix("geforce"))
    if found is None:
        raise UserError(
            f"--plan_device: {name} is not known{did_you_mean(name, _TABLE)}; known are {', '.join(_TABLE)}; for "
            "another one give --plan_vram"
        )
    memory, bandwidth, rate, bus = _TABLE[found]
    return Device(found, "gpu", memory * GIB, bandwidth * 1e9, rate * 1e12, bus * 1e9, f"public figures of {found}")


def device_of_memory(memory: int) -> Device:
    """A GPU of which only the memory is known: with the figures of a common card of at least as much."""
    name = next((name for name in _TYPICAL if _TABLE[name][0] * GIB >= memory), _TYPICAL[-1])
    device = device_named(name)
    return replace(device, name=f"a GPU with {memory / GIB:g} GB", memory=memory, basis=f"public figures of {name}")


def parse_memory(text: str) -> int:
    """Bytes. "12GB", "12 GiB", "12" and "12288MiB" are the same: cards are named by units of 1024.

    Raises: ValueError: no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:(g|m)(?:i?b)?)?\s*", text.lower())
    if found is None or not float(found[1]):
        raise ValueError(f"{text!r} is no size; give one such as 12GB")
    return int(float(found[1]) * (2**20 if found[2] == "m" else GIB))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower())
