"""What all scripts that prepare images and captions have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from library.options.base import opt
from library.options.data import ending_problem
from library.options.logging import ConsoleOptions


@dataclass(frozen=True, kw_only=True)
class WorkOptions(ConsoleOptions, group="work", title="Messages and failures"):
    strict: bool = opt(False, "exit with status 1 if any image failed; without it, only if all of them did")


def ending_problems(ending: str) -> Iterable[str]:
    """The problems of a --caption_extension of files that are written."""
    fault = ending_problem(ending)
    if fault:
        yield f"--caption_extension {fault}"


def ending_warnings(ending: str) -> Iterable[str]:
    """Warnings about a --caption_extension that can be used, but may not be meant."""
    if ending[:1].isalnum():
        yield f"--caption_extension {ending} begins with no dot: the file for dog.png will be dog{ending}"
