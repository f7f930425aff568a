"""A complete, valid command line, and a parser for it."""

from __future__ import annotations

from functools import cache
from importlib import metadata

import pytest

from library.options.base import Options
from library.options.optimizer import optimizer_path
from library.options.parsing import parse_options
from library.registry import FAMILIES, groups_for
from library.runtime.packages import EXTRAS, THIRD_PARTIES


@cache
def _is_installed(package: str) -> bool:
    try:
        metadata.version({"lion_pytorch": "lion-pytorch", **THIRD_PARTIES}.get(package, package))
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture
def traits():
    return FAMILIES["sd"].traits


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
        opts = parse(*needed, "--train_data_dir=images", "--resolution=512", *flags)
        package = optimizer_path(opts.optimizer).split(".")[0]
        if package in {*EXTRAS, *THIRD_PARTIES} and not _is_installed(package):
            pytest.skip(f"{package} is not installed; requirements-dev.txt brings it")
        return opts

    return valid
