import re

import pytest

from library.runtime.logs import LOGGER, setup_logging


@pytest.mark.rows("R239")
def test_simple_lines_are_the_message_alone(capsys):
    setup_logging()
    LOGGER.warning("the first")
    setup_logging(simple=True)
    LOGGER.warning("the second")
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING the first", first)
    assert second == "the second"
