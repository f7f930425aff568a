"""What holds for every test: no network, the console left as it was found, and GPU tests only where there is a GPU."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Generator
from functools import cache

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' processes share the cores, and tiny models need no more
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported, so it comes before every import of ours

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each of hundreds of processes compiles all modules again

os.environ["TRAINSCRIPTS_CACHE"] = tempfile.mkdtemp(prefix="trainscripts-tests-")  # the user's own is not touched

from library import screen
from library.runtime.logs import LOGGER
from library.runtime.packages import EXTRAS, THIRD_PARTIES
from tests.scripts.starting import run_script, start_script  # noqa: F401  # fixtures for every test

sys.dont_write_bytecode = False


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["TRAINSCRIPTS_CACHE"], ignore_errors=True)


# Folders and files that take long, those with the longest files first.
LONG = ("learning", "scripts", "test_quickstart", "test_benchmarks", "memory", "test_every_option", "families")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # or one of several processes would be left with a long file at the end
        items.sort(key=_place)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


# What is missing in a smaller environment is missed by those tests alone that need it. scipy is always there.
OPTIONAL = {"peft", "hypothesis", *THIRD_PARTIES, *(module for module, file in EXTRAS.items() if file != "core")}


@cache
def _missing_packages() -> re.Pattern[str] | None:
    missing = [name for name in sorted(OPTIONAL) if importlib.util.find_spec(name) is None]
    return re.compile(rf"\b({'|'.join(missing)})\b") if missing else None


def _skip_without_package(report: pytest.TestReport | pytest.CollectReport, place: str) -> None:
    """Makes a failure that names an optional package which is not installed a skip."""
    missing = _missing_packages()
    found = missing.search(report.longreprtext) if report.failed and missing is not None else None
    if found is not None:
        report.outcome = "skipped"
        report.longrepr = (place, 0, f"Skipped: {found[0]} is not installed (requirements-dev.txt)")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _skip_without_package(report, str(item.path))
    # Messages about names that are not Unicode cannot travel between the processes that run the tests.
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _skip_without_package(report, str(collector.path))
    return report


def _place(item: pytest.Item) -> int:
    return next((n for n, name in enumerate(LONG) if name in (item.path.parent.name, item.path.stem)), len(LONG))


@pytest.fixture(autouse=True)
def console(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that runs inside a test, or a fixture, points the log at its own place; no test is to inherit that.

    Nor what it was told to keep from the screen.
    """
    LOGGER.handlers[:], LOGGER.propagate = [], True
    LOGGER.setLevel(logging.NOTSET)
    monkeypatch.setattr(screen, "_secrets", set())


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes may hold times, and the names of cases must be the same in every process that runs them."""
    return argname if isinstance(val, bytes) else None
