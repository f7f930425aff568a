"""The user's folders: the cache folder, and whether files can be written to a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from library.errors import UserError
from library.runtime.files import reason
from library.version import NAME


def cache_folder() -> Path:
    """The folder for data that can be made again; it may not exist yet. TRAINSCRIPTS_CACHE names another place."""
    chosen = os.environ.get(f"{NAME.upper()}_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / NAME
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / NAME
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / NAME


def unwritable(folder: Path) -> str | None:
    """Why a folder that is there, or will be made, takes no files; None: it takes them, as far as is known."""
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that is too long, or that no file can have
        return f"{folder} cannot be made ({getattr(error, 'strerror', None) or error})"
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not os.path.isdir(place):
        return f"{place} is no folder" if os.path.lexists(place) else f"there is no {place}"
    return None if os.access(place, os.W_OK | os.X_OK) else f"no permission to write to {place}"


def require_here() -> None:
    """Raises: UserError: the current folder has been removed, so that no relative path leads anywhere."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f"the current folder is gone ({reason(error)}); change into one that exists") from None
