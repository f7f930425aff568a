"""The line that shows how far a run has come, in a file and on terminals of several widths."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys

import pytest

from library.training.status_line import WIDE, Status, StatusLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


STATUS = Status(12, 60, 1.234, 0.09123, 1e-4, 11.24)


def line(monkeypatch, stream, columns=80, total=20_000, status=STATUS) -> str:
    """What stands there after some steps."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((columns, 24)))
    shown = StatusLine(total, total // 2, disable=False)
    shown._bar.mininterval = shown._bar.miniters = 0
    for _ in range(3):
        shown.step(status)
    shown.close()
    return stream.getvalue().replace("\n", "\r").rstrip("\r").rpartition("\r")[2].rstrip()


def test_a_file_has_all_of_it_in_the_shape_that_programs_read(monkeypatch):
    text = line(monkeypatch, io.StringIO())
    assert text.startswith("epoch 12/60, steps:  50%|")
    assert re.search(r"\| 10003/20000 \[00:0\d<[\d:?]+, 1\.23s/step, avr_loss=0\.0912, lr=0\.0001, 11\.2GB\]$", text)
    # How wrappers look for it.
    assert re.search(r"steps:\s+(\d+)%\|.*?\|\s*(\d+)/(\d+)", text).groups() == ("50", "10003", "20000")
    assert re.search(r"avr_loss=([\d.]+)", text)[1] == "0.0912"
    assert re.search(r"epoch (\d+)/(\d+)", text).groups() == ("12", "60")


@pytest.mark.parametrize(
    ("columns", "total", "memory"), [(80, 20_000, ""), (84, 2000, ", 11.2GB"), (WIDE - 1, 20_000, ", 11.2GB")]
)
def test_a_narrow_terminal_shows_what_matters_and_what_has_room(monkeypatch, columns, total, memory):
    text = line(monkeypatch, Terminal(), columns=columns, total=total)
    assert len(text) <= columns
    done = f"{total // 2 + 3}/{total}"
    assert re.fullmatch(
        rf"epoch 12/60, steps: {done} \[[\d:?]+ left, 1\.23s/step, avr_loss=0\.0912{re.escape(memory)}\]", text
    )


def test_a_wide_terminal_has_a_bar(monkeypatch):
    text = line(monkeypatch, Terminal(), columns=140)
    assert "%|" in text
    assert text.endswith("11.2GB]")
    assert len(text) <= 140


def test_before_the_first_loss_has_arrived(monkeypatch):
    text = line(monkeypatch, io.StringIO(), total=10, status=Status(1, 2, 0.1, None, 1e-4, None))
    assert text.endswith(", 0.10s/step, lr=0.0001]")
