"""Randomness by address: a stream is named by what it is for, never by who got there first."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *address: int | str) -> int:
    """A 63-bit seed for one address, e.g. ``derive(seed, "noise", step, rank)``. Equal on every machine and version."""
    text = "/".join(str(part) for part in (seed, *address))
    content = text.encode("utf-8", "surrogatepass")  # file names need not be Unicode
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def generator(device: torch.device | str, seed: int, *address: int | str) -> torch.Generator:
    """A torch generator on `device` for one address; making one does not wait for the device."""
    import torch

    return torch.Generator(device).manual_seed(derive(seed, *address))


class Streams:
    """Generators that are made once and set to an address each time: a step makes none, as CUDA graphs want it."""

    def __init__(self) -> None:
        self._generators: dict[tuple[torch.device, str], torch.Generator] = {}

    def at(self, device: torch.device, seed: int, purpose: str, *address: int | str) -> torch.Generator:
        """As `generator`; it is valid until the next call for this purpose and device."""
        import torch

        kept = device, purpose
        if kept not in self._generators:
            self._generators[kept] = torch.Generator(device)
        return self._generators[kept].manual_seed(derive(seed, purpose, *address))
