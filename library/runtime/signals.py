"""Ctrl-C and SIGTERM as a request that is answered between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from library.runtime.logs import LOGGER

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Within its `with` block the first signal only sets `asked`; a second one ends the run at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # nobody else may handle signals
            self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        name = signal.Signals(number).name
        LOGGER.warning("%s: finishing the step, then saving; once more ends it at once", name)
