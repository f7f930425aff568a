"""Calls without root's right to read and write everything, so that tests of permissions test them for root too."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

_VERSION = 0x20080522  # of the interface that capset(2) has


def without_rights(call: Callable[[], Any]) -> Any:
    """What `call` returns or raises in a thread of its own, which gives up root's capabilities; they end with it."""
    result: list[Any] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            if sys.platform == "linux" and os.geteuid() == 0:
                header, none = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
                assert ctypes.CDLL(None).capset(header, none) == 0
            result.append(call())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return result[0]
