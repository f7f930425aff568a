"""Opening and reading files of users. Every reader goes through here, so that each has the same guards.

What is no regular file is refused: a named pipe would be waited for without end, and a device gives bytes for ever.
What is larger than its reader can use is refused before memory is taken. Both are OSErrors whose `strerror` says why,
so that a reader which names files that cannot be read names these too.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, Literal

_KINDS = (
    (stat.S_ISDIR, "a folder, not a file"),
    (stat.S_ISFIFO, "a named pipe, not a regular file"),
    (stat.S_ISSOCK, "a socket, not a regular file"),
    (stat.S_ISCHR, "a device, not a regular file"),
    (stat.S_ISBLK, "a device, not a regular file"),
)


class NotRegularError(OSError):
    """The path leads to a folder, a pipe, a socket or a device."""

    def __init__(self, path: str | Path, mode: int):
        why = next((why for is_kind, why in _KINDS if is_kind(mode)), "no regular file")
        super().__init__(errno.ENXIO, why, os.fspath(path))


class TooLargeError(OSError):
    """The file has more bytes than its reader takes."""

    def __init__(self, path: str | Path, size: int, limit: int):
        super().__init__(errno.EFBIG, f"it has {size:,} bytes, and at most {limit:,} are read", os.fspath(path))


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading bytes; never waits for the other end of a pipe.

    Raises: OSError: it is not there, may not be read, or is no regular file.
    """
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a NUL character in the path
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from None
    except OSError as error:
        # Windows refuses to open a folder, and a socket cannot be opened anywhere: say so, rather than how.
        try:
            mode = os.stat(path).st_mode
        except OSError:
            raise error from None
        raise (error if stat.S_ISREG(mode) else NotRegularError(path, mode)) from None
    try:
        mode = os.fstat(number).st_mode
        if not stat.S_ISREG(mode):
            raise NotRegularError(path, mode)
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def read_bytes(path: str | Path, limit: int | None = None) -> bytes:
    """All bytes of a regular file.

    Args:
        limit: bytes; a larger file is not read.
    Raises: OSError: as `open_regular`, or the file is larger than `limit`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise TooLargeError(path, size, limit)
        return file.read() if limit is None else file.read(limit + 1)[:limit]


def reason(error: OSError) -> str:
    """Why a file cannot be read or written, in a few words without its path."""
    return error.strerror or str(error) or type(error).__name__


def path_problem(path: str | Path, kind: Literal["file", "folder"]) -> str | None:
    """Why a path does not lead to a regular file that may be read, or to a folder; None: it does. Without the path.

    Never raises, whatever the path is: too long, with a NUL, below a folder that may not be entered.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError:
        return "no name that a file can have (a NUL character)"
    except (FileNotFoundError, NotADirectoryError):
        return "a link that leads nowhere" if os.path.islink(path) else f"no such {kind}"
    except OSError as error:
        return f"it cannot be examined ({reason(error)})"
    if kind == "folder":
        return None if stat.S_ISDIR(mode) else "a file, not a folder"
    if not stat.S_ISREG(mode):
        return NotRegularError(path, mode).strerror
    return None if os.access(path, os.R_OK) else "no permission to read it"
