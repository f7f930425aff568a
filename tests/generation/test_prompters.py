"""Lines that a person types at a terminal: edited and remembered by its own means."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pty = pytest.importorskip("pty")  # which Windows does not have
pytest.importorskip("readline")

ROOT = Path(__file__).resolve().parents[2]
CODE = """
from library.generation.prompters import interactive_lines
for line in interactive_lines():
    print("got", repr(line), flush=True)
print("ended", flush=True)
"""
UP, LEFT, DELETE_BACK, END = b"\x1b[A", b"\x1b[D", b"\x7f", b"\x04"


def reader(terminal: int) -> Callable[[str], None]:
    """What reads on until the terminal has shown a text."""
    shown = bytearray()

    def until(wanted: str) -> None:
        latest = time.monotonic() + 60
        while wanted.encode() not in shown:
            assert time.monotonic() < latest, shown
            if select.select([terminal], [], [], 0.1)[0]:
                shown.extend(os.read(terminal, 1024))
        del shown[: shown.index(wanted.encode()) + len(wanted)]

    return until


def test_editing_and_history():
    terminal, other = pty.openpty()
    until = reader(terminal)
    env = {**os.environ, "TERM": "xterm", "INPUTRC": os.devnull}
    with subprocess.Popen(
        [sys.executable, "-c", CODE], cwd=ROOT, env=env, stdin=other, stdout=other, stderr=other
    ) as run:
        os.close(other)
        try:
            for typed, line in (
                (b"a red cat\n", "a red cat"),
                (b"one" + DELETE_BACK * 3 + b"two" + LEFT + b"X\n", "twXo"),
                (UP + UP + b" at night\n", "a red cat at night"),
            ):
                until("prompt: ")
                os.write(terminal, typed)
                until(f"got {line!r}")
            for typed in (b"\n", END):  # a blank line is none
                until("prompt: ")  # the end counts only once the line is being edited
                os.write(terminal, typed)
            until("ended")
            assert run.wait(10) == 0
        finally:
            run.kill()
            os.close(terminal)
