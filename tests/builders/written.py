"""Tiny models that many tests want as a file: written once by each process that runs tests, and copied from then on."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

Writer = Callable[..., Path]


def written_once(write: Writer) -> Writer:
    """A writer `write(path, ...)` of a file or folder whose ending and further arguments decide what is written."""
    there: dict[tuple[object, ...], Path] = {}

    @wraps(write)
    def copied(path: str | Path, *more: Any, **named: Any) -> Path:
        path = Path(path)
        key = (path.suffix, more, tuple(sorted(named.items())))
        if key not in there:
            there[key] = write(_shelf() / f"{write.__name__}-{len(there)}{path.suffix}", *more, **named)
        if there[key].is_dir():
            return shutil.copytree(there[key], path, dirs_exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        return shutil.copyfile(there[key], path)

    return copied


@cache
def _shelf() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="trainscripts-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
