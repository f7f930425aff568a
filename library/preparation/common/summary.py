"""What came of a run over many images: how many were done, how many had been before, and which failed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from library.runtime.logs import LOGGER, clear_progress
from library.screen import escaped

_NAMED = 20  # failures in the summary; each was named when it happened


@dataclass
class Outcome:
    """Counts of images, and the reason of each failure by its path, or by what else names it."""

    done: int = 0
    skipped: int = 0  # there was nothing to do
    failed: dict[Path | str, str] = field(default_factory=dict)

    def fail(self, path: Path | str, reason: str) -> None:
        """Names an image that could not be used, now and in the summary. `reason`: a few words, or an error's text."""
        self.failed[path] = reason.removeprefix(f"{path}: ")
        LOGGER.warning("%s: %s; left out", path, self.failed[path])

    def status(self, strict: bool) -> int:
        """The exit status: 1 if every image failed, or with `strict` if any did; else 0."""
        return int(bool(self.failed) and (strict or not (self.done or self.skipped)))

    def lines(self) -> list[str]:
        """The summary: one line of numbers, then one per failure; of many failures the first ones by name."""
        counts = {"done": self.done, "skipped": self.skipped, "failed": len(self.failed)}
        parts = [f"{count} {name}" for name, count in counts.items() if count or name == "done"]
        lines = [", ".join(parts)]
        lines += [f"failed: {path}: {self.failed[path]}" for path in sorted(self.failed)[:_NAMED]]
        if len(self.failed) > _NAMED:
            lines.append(f"failed: and {len(self.failed) - _NAMED} more, named above")
        return lines

    @classmethod
    def together(cls, outcomes: Iterable[Outcome]) -> Outcome:
        """The outcome of all processes."""
        whole = cls()
        for one in outcomes:
            whole.done += one.done
            whole.skipped += one.skipped
            whole.failed |= one.failed
        return whole


def show(line: str) -> None:
    """Prints a line to stdout. Characters that the console lacks are replaced."""
    if sys.stdout.isatty():
        clear_progress()  # or the line would stand behind a bar
    encoding = sys.stdout.encoding or "utf-8"
    print(escaped(line).encode(encoding, "replace").decode(encoding), flush=True)
