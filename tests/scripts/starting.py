"""Runs scripts as a user does: in processes of their own, from the repository root, with the network shut off.

They are started the usual way, or forked from a process that has done the imports.
Imports are most of a short run. On Linux a warm start spares them; elsewhere every script is started the usual way.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # sums in the same order in one process and in several; and less work
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

    def start(
        self,
        line: list[str],
        environments: list[dict[str, str]],
        *,
        folder: Path = ROOT,
        launcher: tuple[str, ...] = (),
    ) -> Started:
        """Starts one process for each environment.

        Args:
            line: the script and its arguments, or `-c`, code and its arguments.
            folder: the working folder.
            launcher: words between Python and the script; with them it is started the usual way.
        """
        output, errors = self._folder / "output", self._folder / "errors"
        for file in (output, errors):
            file.write_bytes(b"")
        first = environments[0]
        if launcher or sys.platform != "linux":
            return _start_cold([*launcher, *line], environments, folder, output, errors)
        key = tuple(sorted((name, value) for name, value in first.items() if name.startswith(READ_BY_IMPORTS)))
        if key not in self._warm:
            self._warm[key] = _WarmStart(first)
        return self._warm[key].start(line, environments, folder, output, errors)

    def end(self) -> None:
        for warm in self._warm.values():
            warm.end()


def _start_cold(
    line: list[str], environments: list[dict[str, str]], folder: Path, output: Path, errors: Path
) -> Started:
    with output.open("ab") as out, errors.open("ab") as err:
        processes = [
            subprocess.Popen([sys.executable, *line], cwd=folder, env=environment, stdout=out, stderr=err)
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

    def start(
        self, line: list[str], environments: list[dict[str, str]], folder: Path, output: Path, errors: Path
    ) -> Started:
        places = {"folder": str(folder), "output": str(output), "errors": str(errors)}
        request = {"argv": line, "environments": environments, **places}
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


@pytest.fixture(scope="session")
def start_script(tmp_path_factory) -> Iterator[Callable[..., Started]]:
    """Starts a script, or `-c` and code. One at a time: what it wrote is there until the next one is started.

    `folder`: the working folder. `processes`: as many that train together, as if torch's launcher had started them.
    `launcher`: words between Python and the script. `variables`: of the environment; None takes one away.
    """
    starter = Starter(tmp_path_factory.mktemp("scripts"))

    def start(
        *arguments: str | Path,
        folder: Path = ROOT,
        launcher: tuple[str, ...] = (),
        processes: int = 1,
        variables: Mapping[str, str | None] | None = None,
    ) -> Started:
        line = [os.fspath(argument) for argument in arguments]
        all_variables = {**os.environ, **OFFLINE, **ONE_THREAD, **(variables or {})}
        environment = {name: value for name, value in all_variables.items() if value is not None}
        environments = [{**environment, **place} for place in _places(processes)]
        return starter.start(line, environments, folder=folder, launcher=launcher)

    yield start
    starter.end()


@pytest.fixture(scope="session")
def run_script(start_script) -> Callable[..., subprocess.CompletedProcess]:
    """Starts a script, see `start_script`, and waits for its end."""

    def run(*arguments: str | Path, **how: object) -> subprocess.CompletedProcess:
        return start_script(*arguments, **how).result()

    return run


def _places(processes: int) -> list[dict[str, str]]:
    """What torch's launcher tells each of several processes."""
    if processes == 1:
        return [{}]
    port = _free_port()
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranked = [{**common, "RANK": number, "LOCAL_RANK": number} for number in range(processes)]
    return [{name: str(value) for name, value in place.items()} for place in ranked]


def _free_port() -> int:
    """A port on which nothing listens, below those that systems hand out to whoever connects in the meantime."""
    while True:
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
