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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
def test_a_log_on_a_full_disk_is_one_warning_and_messages_go_to_the_screen(capsys):
    setup_logging(file="/dev/full", simple=True)
    for word in ("first", "second"):
        LOGGER.info("the %s message", word)
    warning, first, second = capsys.readouterr().err.splitlines()
    assert warning == "--console_log_file: /dev/full cannot be written (No space left on device); messages come here"
    assert (first, second) == ("the first message", "the second message")


def test_a_log_in_a_place_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--console_log_file: cannot write .*: Not a directory"):
        setup_logging(file=str(tmp_path / "file" / "log.txt"))


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
