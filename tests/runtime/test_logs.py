import os
import re
import sys

import pytest

from library.errors import UserError
from library.runtime.logs import LOGGER, progress, setup_logging


@pytest.mark.rows("R239")
def test_simple_lines_are_the_message_alone(capsys):
    setup_logging()
    LOGGER.warning("the first")
    setup_logging(simple=True)
    LOGGER.warning("the second")
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING the first", first)
    assert second == "the second"


def test_names_that_are_no_unicode_go_into_the_file_with_escapes(tmp_path, capsys):
    setup_logging(file=str(tmp_path / "log.txt"), simple=True)
    LOGGER.warning("caf\udce9.png is empty")
    setup_logging()  # closes nothing, but the next test writes elsewhere
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "caf\\udce9.png is empty\n"
    assert capsys.readouterr().err == ""


def test_messages_take_the_place_of_a_bar(capsys):
    setup_logging(simple=True)
    with progress(10, "work") as bar:
        LOGGER.warning("a message")
        bar.update()
    (line,) = [line for line in capsys.readouterr().err.split("\n") if "a message" in line]
    assert line.rpartition("\r")[2] == "a message"
    assert "work" in line


def test_every_message_is_one_line_that_a_screen_may_show(capsys):
    setup_logging(simple=True)
    LOGGER.warning("%s: left out", "a\x1b[2J\nb.png")
    LOGGER.warning(f"got hf_{'a1' * 17}")
    assert capsys.readouterr().err == "a\\x1b[2J\\nb.png: left out\ngot (hidden)\n"


@pytest.mark.parametrize("kind", ["a folder", "a pipe without reader", "below a file", "a name too long", "a NUL"])
def test_a_log_file_that_cannot_be_written_is_one_line(tmp_path, kind):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    name = {
        "a folder": ".", "a pipe without reader": "pipe", "below a file": "file/x", "a name too long": "x" * 300,
        "a NUL": "a\0b",
    }[kind]  # fmt: skip
    with pytest.raises(UserError, match=r"^--console_log_file: cannot write "):
        setup_logging(file=str(tmp_path / name))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
def test_a_log_on_a_full_disk_is_one_warning_and_messages_go_to_the_screen(capsys):
    setup_logging(file="/dev/full", simple=True)
    for word in ("first", "second"):
        LOGGER.info("the %s message", word)
    warning, first, second = capsys.readouterr().err.splitlines()
    assert warning == "--console_log_file: /dev/full cannot be written (No space left on device); messages come here"
    assert (first, second) == ("the first message", "the second message")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
def test_a_screen_that_takes_nothing_ends_no_run(monkeypatch):
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115  # closing it is an error too
    monkeypatch.setattr(sys, "stderr", full)
    setup_logging(simple=True)
    with progress(10, "work", mininterval=0) as bar:
        LOGGER.warning("a message")
        bar.update()
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space left"):
        full.close()
