"""The line that shows, while a run goes on, how far it has come."""

from __future__ import annotations

import shutil
import sys
from typing import NamedTuple

from library.runtime import logs

WIDE = 118  # columns from which on the line has a bar and the rate; files and pipes have them always
_WIDE = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_NARROW = "{desc}: {n_fmt}/{total_fmt} [{remaining} left{postfix}]"


class Status(NamedTuple):
    epoch: int
    epochs: int
    seconds: float  # per step
    loss: float | None  # a running average
    rate: float  # of the first group
    memory: float | None  # peak, in GB


class StatusLine:
    """``epoch 2/6, steps:  45%|####   | 90/200 [00:36<00:44, 0.40s/step, avr_loss=0.0912, lr=0.0001, 11.2GB]``

    The words and signs are those that programs look for which read the output of trainers. A terminal that has no room
    for all of it has the line without bar, elapsed time and rate.
    """

    def __init__(self, total: int, done: int, *, disable: bool):
        self._bar = logs.progress(total, "steps", unit="steps", disable=disable, initial=done, bar_format=_WIDE)
        self._disabled = disable

    def step(self, status: Status) -> None:
        """One step more."""
        if not self._disabled:
            columns = shutil.get_terminal_size().columns if sys.stderr.isatty() else WIDE
            parts = [f"{status.seconds:.2f}s/step"]
            if status.loss is not None:
                parts.append(f"avr_loss={status.loss:.4f}")
            if columns >= WIDE:
                parts.append(f"lr={status.rate:.3g}")
            what = f"epoch {status.epoch}/{status.epochs}, steps"
            taken = (
                len(what) + 2 * len(str(self._bar.total)) + len(": / [0:00:00 left]") + sum(len(p) + 2 for p in parts)
            )
            if status.memory is not None and taken + len(memory := f"{status.memory:.1f}GB") + 2 <= columns:
                parts.append(memory)
            self._bar.bar_format = _WIDE if columns >= WIDE else _NARROW
            self._bar.set_description_str(what, refresh=False)
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
