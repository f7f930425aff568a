"""What this toolkit calls itself in the files it writes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

NAME = "trainscripts"
VERSION = "0.1.0"


@lru_cache(maxsize=1)
def commit() -> str:
    """The checked-out commit, 40 hex digits, or "(unknown)" where this is no git checkout. Starts no process."""
    git = Path(__file__).resolve().parent.parent / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        ref = head.removeprefix("ref: ")
        if (git / ref).is_file():
            return (git / ref).read_text(encoding="utf-8").strip()
        packed = (git / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next(line.split()[0] for line in packed if line.endswith(f" {ref}"))
    except (OSError, StopIteration):
        return "(unknown)"
