"""How large the weights of a model are on the disk."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".bin")


def weights_size(source: str | Path) -> int:
    """Bytes of a model's file; of a Diffusers folder, the largest file of each part. 0: there is no such path."""
    source = Path(source)
    if source.is_file():
        return source.stat().st_size
    largest: dict[Path, int] = {}
    for file in source.glob("*/*") if source.is_dir() else ():
        if file.suffix in WEIGHTS and file.is_file():
            largest[file.parent] = max(largest.get(file.parent, 0), file.stat().st_size)
    return sum(largest.values())


def with_size(source: str | Path) -> str:
    """ "model.safetensors (4.2 GB)"; the name alone where nothing of it is on this machine yet."""
    size = weights_size(source)
    for unit, word in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{source} ({size / unit:.1f} {word})"
    return str(source)
