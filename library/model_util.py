"""A name under which other programs import what they need."""

from __future__ import annotations

from pathlib import Path


def is_safetensors(path: str | Path) -> bool:
    """Whether a file is named .safetensors, as these programs expect. Our own readers look into the file."""
    return Path(path).suffix.lower() == ".safetensors"
