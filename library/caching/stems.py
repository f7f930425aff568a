"""Which images of a run have their folder and stem in common, so that cache files must tell them apart."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.data.types import Record


def shared_stems(records: Iterable[Record]) -> frozenset[Path]:
    """The images that differ from another one in nothing but the extension, such as a.png and a.jpg."""
    by_stem: dict[Path, set[Path]] = {}
    for record in records:
        by_stem.setdefault(record.path.with_suffix("") if record.present else record.path, set()).add(record.path)
    return frozenset(path for paths in by_stem.values() if len(paths) > 1 for path in paths)
