from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from library.preparation.common.summary import Outcome, show
from library.runtime.logs import LOGGER, progress


def failed(*names: str) -> dict[Path, str]:
    return {Path(name): "broken" for name in names}


@pytest.mark.parametrize(
    ("outcome", "status", "strict_status"),
    [
        (Outcome(), 0, 0),
        (Outcome(done=2), 0, 0),
        (Outcome(skipped=2), 0, 0),
        (Outcome(done=1, failed=failed("a.png")), 0, 1),
        (Outcome(skipped=1, failed=failed("a.png")), 0, 1),
        (Outcome(failed=failed("a.png")), 1, 1),
    ],
)
def test_status(outcome, status, strict_status):
    assert (outcome.status(strict=False), outcome.status(strict=True)) == (status, strict_status)


def test_lines_name_each_failure_once_and_in_order():
    outcome = Outcome(done=3, skipped=1, failed=failed("b.png", "a.png"))
    assert outcome.lines() == ["3 done, 1 skipped, 2 failed", "failed: a.png: broken", "failed: b.png: broken"]
    assert Outcome().lines() == ["0 done"]


def test_of_very_many_failures_the_first_are_named():
    lines = Outcome(failed=failed(*(f"{n:03}.png" for n in range(50)))).lines()
    assert lines[1] == "failed: 000.png: broken"
    assert lines[20:] == ["failed: 019.png: broken", "failed: and 30 more, named above"]


def test_a_failure_is_reported_at_once_and_its_path_once(caplog):
    LOGGER.propagate = True
    outcome, path = Outcome(), Path("x") / "a.png"
    with caplog.at_level(logging.WARNING, LOGGER.name):
        outcome.fail(path, f"{path}: cut off")
    assert caplog.messages == [f"{path}: cut off; left out"]
    assert outcome.failed == {path: "cut off"}


def test_processes_add_up():
    whole = Outcome.together(
        [Outcome(1, 2, failed("a")), Outcome(10, 20, failed("b")), Outcome()],
    )
    assert whole == Outcome(11, 22, failed("a", "b"))


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_take_the_place_of_a_bar(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    with progress(10, "work"):
        show("a line")
        shown = capsys.readouterr()
    assert shown.out == "a line\n"
    assert shown.err.endswith("\r") is terminal
