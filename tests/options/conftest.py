"""A complete, valid command line, and a parser for it."""

from __future__ import annotations

import pytest

from library.options.base import Options
from library.options.parsing import parse_options
from library.options.scripts import groups_for, traits_for


@pytest.fixture
def traits():
    return traits_for("sd")


@pytest.fixture
def groups():
    return groups_for("sd", "network")


@pytest.fixture
def parse(groups):
    """Options from flags alone."""

    def parse(*flags: str) -> Options:
        return parse_options(groups, flags)

    return parse


@pytest.fixture
def valid(parse):
    """Options from flags added to a command line without problems."""

    def valid(*flags: str) -> Options:
        needed = ("--pretrained_model_name_or_path=m.safetensors", "--output_dir=out", "--network_module=networks")
        return parse(*needed, "--train_data_dir=pictures", "--resolution=512", *flags)

    return valid
