import re

import pytest

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
