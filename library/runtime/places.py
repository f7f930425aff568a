"""Folders of the user's that hold what can be made again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from library.version import NAME


def cache_folder() -> Path:
    """Where this toolkit may keep what it can make again; not made yet. TRAINSCRIPTS_CACHE names another place."""
    chosen = os.environ.get(f"{NAME.upper()}_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / NAME
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / NAME
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / NAME
