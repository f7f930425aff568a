"""The one place where files and folders take their names: when they are whole and on the disk, and not before.

What is written here survives a kill and a power cut: it is written beside its name, flushed, renamed, and the folder is
flushed. What a killed run leaves are temporary files and folders called ``.<name>.<8 signs>.tmp``. A living writer has
a lock on its own (on systems with `flock`), so that `abandoned` finds those of dead ones only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FRESH, OLD = "new", "old"  # in the temporary folder of a folder: what is being written; what it replaces (until 1.0)
LONGEST_NAME = 255  # bytes, on nearly every file system

_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp", re.DOTALL)
_AROUND = len("..12345678.tmp")  # bytes of a temporary name beside the target's
_BACKUP = ".previous"  # ending of the name that a replaced folder has for a moment, where two cannot be exchanged
_LONG_AGO = 24 * 3600.0  # seconds after which a temporary file is taken for abandoned where there are no locks
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EBADF)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replacing(path: str | Path, *, flush: bool = True) -> Iterator[Path]:
    """Gives a temporary file name in the folder of `path`; on success the file is flushed to disk and renamed.

    If the block raises, the temporary file is removed and an earlier `path` stays as it was.

    Args:
        flush: False for what can be made again and is verified whenever it is read: waiting for the disk takes longer
            than writing many small files. After a power cut such a file may be empty, unless `flush_file_systems` was
            called since.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary, lock = _new_temporary(path, folder=False)
    try:
        yield temporary
        if flush:
            _flush(temporary, os.O_RDWR)
        os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
        if flush:
            flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        _release(lock)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Gives an empty folder beside `path`; on success all in it is flushed and it takes the place of `path`.

    There is no moment in which no whole folder has the name, where the system can exchange two names. Elsewhere the
    earlier one is called ``<name>.previous`` for that moment; `recover` gives it its name back.
    """
    path = Path(path)
    with work_folder(path) as fresh:
        yield fresh
        _flush_tree(fresh)
        # What has the name is in the place of `fresh` afterwards, or gone.
        if not os.path.lexists(path):
            os.rename(fresh, path)
        elif not _exchange(fresh, path):
            backup = backup_of(path)
            remove(backup)
            os.rename(path, backup)
            flush_folder(path.parent)
            try:
                os.rename(fresh, path)
            except OSError:
                os.rename(backup, path)
                raise
            flush_folder(path.parent)
            remove(backup)
        flush_folder(path.parent)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Gives an empty folder beside `path`; on success it becomes `path`, unless another process was first.

    Whoever looks at `path` meanwhile finds no folder, or a whole one. Raises: OSError: `path` cannot be made.
    """
    path = Path(path)
    with work_folder(path) as fresh:
        yield fresh
        _flush_tree(fresh)
        try:
            os.rename(fresh, path)
        except OSError:
            if not path.is_dir():
                raise
        flush_folder(path.parent)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process is in such a block for this folder: for reading a file, changing and replacing it.

    Where the system or the file system has no locks it does not wait. No file is left.
    """
    lock = _lock(Path(os.path.realpath(folder)), wait=True)
    try:
        yield
    finally:
        _release(lock)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, so that they survive a power cut. Raises: OSError."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """Flushes the names in a folder to the disk, where the system can do that. Raises: OSError: the disk fails."""
    if fcntl is not None:
        _flush(path, os.O_RDONLY)


def flush_file_systems(folders: Iterable[Path]) -> None:
    """Flushes all that was written to the file systems of these folders: one wait for any number of files."""
    seen: set[int] = set()
    for folder in folders:
        with contextlib.suppress(OSError):
            device = os.stat(folder).st_dev
            if device not in seen:
                seen.add(device)
                _flush_file_system(folder)


def remove(path: Path) -> None:
    """Deletes exactly this file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fitting(start: str, end: str, longest: int = LONGEST_NAME) -> str:
    """``start + end``, or, where that is no name for a file, a shorter start with a checksum of the whole one.

    Args: longest: bytes that a name may have.
    """
    if len(os.fsencode(start + end)) <= longest:
        return start + end
    mark = "~" + blake2b(os.fsencode(start), digest_size=4).hexdigest()
    return _cut(start, longest - len(os.fsencode(mark + end))) + mark + end


# ---- what dead writers have left


@dataclass(frozen=True)
class Leftover:
    """A temporary file or folder whose writer is dead."""

    path: Path
    target: Path  # what it was to become


def abandoned(folder: Path, concerns: Callable[[str], bool]) -> Iterator[Leftover]:
    """Temporary files and folders of dead writers in `folder`. Each is locked until the next is asked for.

    Args: concerns: whether a target's name is looked for. Of names that are too long the end is cut off.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        match = _TEMPORARY.fullmatch(name)
        if match is None or not concerns(match[1]):
            continue
        path = folder / name
        with contextlib.suppress(OSError):  # gone meanwhile, or locked by its writer
            lock = _lock(path, wait=False)
            try:
                if lock is not None or time.time() - os.stat(path).st_mtime > _LONG_AGO:
                    yield Leftover(path, folder / match[1])
            finally:
                _release(lock)


def discard_abandoned(targets: Iterable[Path]) -> list[Path]:
    """Removes what dead writers of these files have left. Returns: what was removed."""
    starts: dict[Path, set[str]] = {}
    for target in targets:
        starts.setdefault(target.parent, set()).add(beginning(target))
    removed = []
    for folder, names in starts.items():
        for leftover in abandoned(folder, names.__contains__):
            remove(leftover.path)
            removed.append(leftover.path)
    return removed


@lru_cache(maxsize=1024)
def discard_once(folder: Path, suffix: str) -> None:
    """Removes what dead writers of files with an ending have left in a folder, the first time that this is called."""
    for leftover in abandoned(folder, lambda name: name.endswith(suffix)):
        if not leftover.path.is_dir():
            remove(leftover.path)


def beginning(path: Path) -> str:
    """The part of its target's name that a temporary name has: all of it, if names may be so long."""
    return _cut(path.name, _longest_name(path.parent) - _AROUND)


def backup_of(path: Path) -> Path:
    """The name that the earlier folder has while another takes its place, where two cannot be exchanged."""
    return path.with_name(fitting(path.name, _BACKUP))


def recover(path: Path) -> bool:
    """Gives a folder its name back that was being replaced when the writer died. Returns: whether it was so.

    Where the new one was in place already, the earlier one is removed.
    """
    backup = backup_of(path)
    if not backup.is_dir():
        return False
    if os.path.lexists(path):
        shutil.rmtree(backup)
        return False
    os.rename(backup, path)
    flush_folder(path.parent)
    return True


# ---- temporary names


def _new_temporary(path: Path, *, folder: bool) -> tuple[Path, int | None]:
    """A new file or folder beside `path`, and the lock on it, if there are locks."""
    start = f".{beginning(path)}."
    while True:
        if folder:
            name = tempfile.mkdtemp(prefix=start, suffix=".tmp", dir=path.parent)
        else:
            handle, name = tempfile.mkstemp(prefix=start, suffix=".tmp", dir=path.parent)
            os.close(handle)
        lock = _lock(Path(name), wait=True)
        if os.path.lexists(name):  # else another process took it for abandoned before it was locked
            return Path(name), lock
        _release(lock)


@contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """A new folder in a locked temporary folder beside `path`, all of which is gone afterwards."""
    make_folder(path.parent)
    work, lock = _new_temporary(path, folder=True)
    try:
        (work / FRESH).mkdir()
        yield work / FRESH
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _release(lock)


def _lock(path: Path, *, wait: bool) -> int | None:
    """An open file with the lock on `path`; None: there are no locks here, or nothing of that name.

    Raises: BlockingIOError: another process has the lock, and this does not `wait`.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def _release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _cut(name: str, longest: int) -> str:
    """As many characters from the start as take at most `longest` bytes."""
    while len(os.fsencode(name)) > longest:
        name = name[:-1]
    return name


@lru_cache(maxsize=256)
def _longest_name(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        return LONGEST_NAME


# ---- what the system is asked for


def _flush(path: Path, mode: int) -> None:
    try:
        handle = os.open(path, mode)
    except OSError as error:
        if mode == os.O_RDONLY and error.errno in _UNSUPPORTED:  # a folder that may be written to and not listed
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(handle)


def _flush_tree(folder: Path) -> None:
    """Flushes every file and folder of a new tree."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if path.is_file() and not path.is_symlink():
                _flush(path, os.O_RDWR)
        flush_folder(Path(place))


def _flush_file_system(folder: Path) -> None:
    call = getattr(_system(), "syncfs", None)
    if call is None:
        if hasattr(os, "sync"):
            os.sync()
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        call(handle)
    finally:
        os.close(handle)


def _exchange(left: Path, right: Path) -> bool:
    """Exchanges two names in one step; False: this system or file system cannot."""
    call = getattr(_system(), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), os.fspath(right))


@lru_cache(maxsize=1)
def _system() -> ctypes.CDLL | None:
    """The C library; only of Linux something is used that Python does not offer."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None, use_errno=True)
    except OSError:
        return None


_UMASK = os.umask(0)  # once and here: it can only be read by changing it, which other threads would see
os.umask(_UMASK)
