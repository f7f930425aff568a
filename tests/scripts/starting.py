"""Command lines, and processes that run them: started the usual way, or forked from one that has done the imports.

Imports are most of a short run. On Linux a warm start spares them; elsewhere every script is started the usual way.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 900  # seconds that a script may take
READ_BY_IMPORTS = ("HF_", "OMP_", "MKL_", "PYTHON", "TORCH")  # beginnings of variables that libraries read only once


def as_words(options: Mapping[str, object]) -> list[str]:
    """Options as a command line has them: True is a flag, None leaves out, a list has several values."""
    words = []
    for name, value in options.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}" if value is True else f"--{name}={value}")
    return words


@dataclass
class Started:
    """A script at work. Its process may be ended by `pid`, that of the first where there are several."""

    arguments: list[str]
    pid: int
    output: Path
    errors: Path
    _wait: Callable[[float], int | None]  # seconds -> the exit status; None: it is still running
    _code: int | None = None

    def is_running(self) -> bool:
        return self._ended(0) is None

    def kill(self) -> None:
        """At once, without a chance to tidy up."""
        if not self.is_running():
            return
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(self.pid, getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows has one way only

    def said(self) -> str:
        """What it has written to standard error so far."""
        return self.errors.read_text()

    def result(self) -> subprocess.CompletedProcess:
        """Waits for its end."""
        code = self._ended(LONGEST)
        if code is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.arguments, LONGEST, stderr=self.said())
        return subprocess.CompletedProcess(self.arguments, code, self.output.read_text(), self.said())

    def _ended(self, seconds: float) -> int | None:
        if self._code is None:
            self._code = self._wait(seconds)
        return self._code


class Starter:
    """Starts scripts one after another; see `start`."""

    def __init__(self, folder: Path):
        self._folder = folder  # for what they write
        self._warm: dict[tuple[tuple[str, str], ...], _WarmStart] = {}

    def start(self, line: list[str], environments: list[dict[str, str]], *, launcher: tuple[str, ...] = ()) -> Started:
        """Starts one process for each environment.

        Args:
            line: the script and its arguments.
            launcher: words between Python and the script; with them it is started the usual way.
        """
        output, errors = self._folder / "output", self._folder / "errors"
        for file in (output, errors):
            file.write_bytes(b"")
        first = environments[0]
        if launcher or not line[0].endswith(".py") or sys.platform != "linux":
            return _start_cold([*launcher, *line], environments, output, errors)
        key = tuple(sorted((name, value) for name, value in first.items() if name.startswith(READ_BY_IMPORTS)))
        if key not in self._warm:
            self._warm[key] = _WarmStart(first)
        return self._warm[key].start(line, environments, output, errors)

    def end(self) -> None:
        for warm in self._warm.values():
            warm.end()


def _start_cold(line: list[str], environments: list[dict[str, str]], output: Path, errors: Path) -> Started:
    with output.open("ab") as out, errors.open("ab") as err:
        processes = [
            subprocess.Popen([sys.executable, *line], cwd=ROOT, env=environment, stdout=out, stderr=err)
            for environment in environments
        ]

    def wait(seconds: float) -> int | None:
        try:
            return max((process.wait(seconds) for process in processes), key=abs)
        except subprocess.TimeoutExpired:
            return None

    return Started(line, processes[0].pid, output, errors, wait)


class _WarmStart:
    """A process that runs `warm_start.py`."""

    def __init__(self, environment: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_start.py"))],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # so that all that it started can be ended together
        )

    def start(self, line: list[str], environments: list[dict[str, str]], output: Path, errors: Path) -> Started:
        request = {"argv": line, "environments": environments, "output": str(output), "errors": str(errors)}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        pid = self._answer(LONGEST)
        assert pid is not None, "the imports take too long"
        return Started(line, pid, output, errors, self._answer)

    def _answer(self, seconds: float) -> int | None:
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            return None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that has done the imports is gone")
        return int(line)

    def end(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
