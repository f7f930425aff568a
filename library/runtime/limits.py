"""Exceptions caused by the machine and not by the code: no memory, no room, no permission, a file that is gone.

Readers and writers name what they were about themselves. This is the last resort at the outermost border of a script,
for what was raised far from anyone who knew.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from library.errors import UserError
from library.runtime.files import reason

# Of OSErrors without a file's name. Others without one are about connections and processes, where a traceback helps.
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)
# What torch's allocators say, which raise RuntimeErrors, by what ran out.
_ALLOCATORS = (
    ("DefaultCPUAllocator", "CPU memory"),
    ("can't allocate memory", "CPU memory"),
    ("CUDA out of memory", "GPU memory"),
    ("Storage size calculation overflowed", "memory"),
    ("Invalid buffer size", "memory"),
)


def as_user_error(error: BaseException) -> UserError | None:
    """One line for what a user can act on; None for what may be a fault of the code, whose traceback is wanted."""
    what = exhausted(error)
    if what:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0].removeprefix("[enforce fail at ")
        return UserError(
            f"not enough {what} ({line[:200]}); use smaller images, batches or network dimensions, "
            "or the options of docs/memory.md"
        )
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.filename is not None:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        return UserError(f"{' -> '.join(names)}: {reason(error)}") if names else None
    return UserError(f"{reason(error)}; nothing more can be written") if error.errno in _OF_THE_MACHINE else None


def exhausted(error: BaseException) -> str | None:
    """The memory that an error reports as exhausted."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return "GPU memory"
    if isinstance(error, MemoryError):
        return "CPU memory"
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    return next((what for words, what in _ALLOCATORS if words in text), None)


@contextmanager
def during(phase: str) -> Iterator[None]:
    """A context that lets `out_of_memory` know what a run was about; the innermost one counts."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not hasattr(error, "phase"):
            error.phase = phase
        raise


def out_of_memory(error: BaseException) -> str | None:
    """What ran out, in which phase, what was asked for and what was free; None: it is another kind of error."""
    what = exhausted(error)
    if what is None:
        return None
    text = str(error)
    phase = getattr(error, "phase", None)
    found = re.search(r"[Tt]ried to allocate ([\d.]+ (?:bytes|[KMG]iB))", text)
    free = re.search(r"of which ([\d.]+ (?:bytes|[KMG]iB)) is free", text)
    facts = [f"{found[1]} were asked for"] if found else []
    facts += [f"{free[1]} were free"] if free else []
    return f"not enough {what}{f' during {phase}' if phase else ''}" + (f" ({', '.join(facts)})" if facts else "")
