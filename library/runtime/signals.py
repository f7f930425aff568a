"""Ctrl-C and SIGTERM as a request that is answered between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from library.runtime.logs import LOGGER

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds within which launchers pass on a Ctrl-C that the terminal has sent to every process itself.
_PASSED_ON = 1.0


def leave_interrupts_to_the_parent(*_: object) -> None:
    """Ignores interrupts in a worker process, to which a terminal sends Ctrl-C as well. Call it at its start."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Interruption:
    """A context in which the first signal only sets `requested`; a second one ends the run at once.

    Where a launcher has started several processes, what follows at once counts as the first one still.
    """

    def __init__(self) -> None:
        self.requested = 0  # the signal's number; 0: none has come
        self._before: dict[int, Any] = {}
        self._process = os.getpid()
        self._launched = "LOCAL_RANK" in os.environ
        self._when = 0.0

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # no other thread may handle signals
            self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker that has not left interrupts to its parent yet
            return
        if self.requested:
            if self._launched and time.monotonic() - self._when < _PASSED_ON:
                return
            raise KeyboardInterrupt
        self.requested, self._when = number, time.monotonic()
        name = signal.Signals(number).name
        LOGGER.warning("%s: finishing the step, then saving; a second signal stops at once", name)


def exit_status(number: int) -> int:
    """What a process returns that a signal has ended, as shells expect it: 130 for Ctrl-C."""
    return 128 + number
