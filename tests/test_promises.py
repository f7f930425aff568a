"""The table of promises is current, and the tool that keeps it so sees what it must see."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import promises

PAGE = """# Promises

| id | promise | needs | held by |
|---|---|---|---|
| R1 | one | |  |
| R2 | a \\| b |  | `stale` |
| R3 | on a card | GPU |  |
| C1 | a command |  |  |

| id | why |
|---|---|
| R8, R9 | advice |
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "compatibility.md").write_text(PAGE, encoding="utf-8")
    (tmp_path / "tests" / "data").mkdir(parents=True)
    return tmp_path


def add_test(tree: Path, source: str, name: str = "data/test_it.py") -> None:
    (tree / "tests" / name).write_text(f"import pytest\n\n{source}\n", encoding="utf-8")


def page(tree: Path) -> str:
    return (tree / "docs" / "compatibility.md").read_text(encoding="utf-8")


def run(tree: Path, *options: str) -> int:
    return promises.main(["--root", str(tree), *options])


def test_this_table_is_current(capsys):
    assert promises.main(["--check"]) == 0, capsys.readouterr().err


def test_every_promise_has_the_form_of_one():
    table = promises.read_table((promises.ROOT / promises.TABLE).read_text(encoding="utf-8"))
    assert table.problems == []
    assert {promise.needs for promise in table.promises.values()} == {"", "GPU", "real weights"}


@pytest.mark.parametrize(
    ("source", "test"),
    [
        ('@pytest.mark.rows("R1")\ndef test_a(): ...', "test_a"),
        ('@pytest.mark.rows("C1", "R1")\n@pytest.mark.slow\nasync def test_a(): ...', "test_a"),
        ('@pytest.mark.rows("R1")\nclass TestA:\n    def test_b(self): ...', "TestA"),
        ('class TestA:\n    @pytest.mark.rows("R1")\n    def test_b(self): ...', "TestA::test_b"),
        (
            '@pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.rows("R1"))])\ndef test_a(x): ...',
            "test_a",
        ),
    ],
)
def test_a_marker_is_found(tree, source, test):
    add_test(tree, source)
    assert run(tree, "--write") == 0
    assert f"| R1 | one |  | `tests/data/test_it.py::{test}` |\n" in page(tree)
    assert run(tree, "--check") == 0


@pytest.mark.parametrize("value", ['pytest.mark.rows("R1")', '[pytest.mark.slow, pytest.mark.rows("R1")]'])
def test_a_module_can_be_marked(tree, value):
    add_test(tree, f"pytestmark = {value}\n\ndef test_a(): ...")
    run(tree, "--write")
    assert "| R1 | one |  | `tests/data/test_it.py` |\n" in page(tree)


def test_writing_changes_nothing_but_the_last_column(tree):
    add_test(tree, '@pytest.mark.rows("R2")\ndef test_b(): ...\n\n@pytest.mark.rows("R2")\ndef test_a(): ...')
    run(tree, "--write")
    files = "`tests/data/test_it.py::test_a`<br>`tests/data/test_it.py::test_b`"
    assert page(tree) == PAGE.replace("`stale`", files).replace("| one | |", "| one |  |")
    before = page(tree)
    run(tree, "--write")
    assert page(tree) == before


def test_what_has_no_test_is_listed(tree, capsys):
    add_test(tree, '@pytest.mark.rows("R2")\ndef test_a(): ...')
    assert run(tree) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "1 of 3 promises are held by tests",
        "no test yet (2):",
        "  R1    one",
        "  C1    a command",
        "full proof needs more than a CPU and the bundled model (1):",
        "  R3    on a card [GPU; no test]",
    ]


def test_a_stale_column_fails_the_check(tree, capsys):
    assert run(tree, "--check") == 1
    assert "out of date" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('@pytest.mark.rows("R7")\ndef test_a(): ...', "tests/data/test_it.py::test_a: R7 is no promise of"),
        ('@pytest.mark.rows("R9")\ndef test_a(): ...', "tests/data/test_it.py::test_a: R9 is no promise of"),
        ("@pytest.mark.rows(*IDS)\ndef test_a(): ...", "tests/data/test_it.py:3: rows() takes ids in quotes, got *IDS"),
        ('held = pytest.mark.rows("R1")', "tests/data/test_it.py:3: a rows() marker must be"),
    ],
)
def test_a_wrong_marker_fails_the_check(tree, capsys, source, message):
    add_test(tree, source)
    run(tree, "--write")
    capsys.readouterr()
    assert run(tree, "--check") == 1
    assert message in capsys.readouterr().err


def test_a_promise_cannot_stand_there_twice(tree, capsys):
    file = tree / "docs" / "compatibility.md"
    file.write_text(PAGE + "| R2 | again |\n", encoding="utf-8")
    assert run(tree, "--check") == 1
    assert "R2 stands there twice" in capsys.readouterr().err
