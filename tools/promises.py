"""Which promises of docs/compatibility.md are held by tests, and by which.

A test names what it proves: `@pytest.mark.rows("R36", "R44")`, on a function, a class, or a module by `pytestmark`.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path("docs") / "compatibility.md"
_ID = re.compile(r"[CR]\d+")
_CELL_END = re.compile(r"(?<!\\)\|")  # a pipe inside a cell is written \|


@dataclass(frozen=True)
class Promise:
    """One row of the table."""

    id: str
    text: str
    needs: str  # "", "GPU" or "real weights"
    held_by: str  # the last cell as it stands in the file


@dataclass
class Table:
    """docs/compatibility.md, read."""

    promises: dict[str, Promise] = field(default_factory=dict)  # in the order of the page
    refused: set[str] = field(default_factory=set)  # ids of what is not promised
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Marker:
    """One id that a test claims."""

    id: str
    test: str  # as pytest takes it: file::function, file::class, or file


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in _CELL_END.split(line)[1:-1]]


def read_table(text: str) -> Table:
    """The promises: rows with four cells. Rows with two cells begin with the ids of what is not promised."""
    table = Table()
    for line in text.splitlines():
        cells = _cells(line)
        if not cells or not _ID.match(cells[0]):
            continue
        ids = _ID.findall(cells[0])
        again = [one for one in ids if one in table.refused or one in table.promises]
        if len(cells) == 2:
            table.refused.update(ids)
        elif len(cells) == 4 and cells[0] == ids[0]:
            table.promises[ids[0]] = Promise(*cells)
        else:
            table.problems.append(f"{TABLE.as_posix()}: a row is id | promise | needs | held by, got: {line}")
        table.problems += [f"{TABLE.as_posix()}: {one} stands there twice" for one in again]
    return table


def find_markers(root: Path) -> tuple[list[Marker], list[str]]:
    """(the markers of all tests under `root`/tests, problems with how they are written)."""
    markers, problems = [], []
    for file in sorted((root / "tests").rglob("*.py")):
        name = file.relative_to(root).as_posix()
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=name)
        seen: set[ast.Call] = set()
        for call, test in _marked(tree, name):
            seen.add(call)
            for argument in call.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    markers.append(Marker(argument.value, test))
                else:
                    problems.append(
                        f"{name}:{argument.lineno}: rows() takes ids in quotes, got {ast.unparse(argument)}"
                    )
        problems += [
            f"{name}:{call.lineno}: a rows() marker must be a decorator or in pytestmark"
            for call in _rows_calls(tree)
            if call not in seen
        ]
    return markers, problems


def _rows_calls(node: ast.AST) -> Iterator[ast.Call]:
    for found in ast.walk(node):
        if isinstance(found, ast.Call) and ast.unparse(found.func) in ("pytest.mark.rows", "mark.rows"):
            yield found


def _marked(tree: ast.Module, file: str) -> Iterator[tuple[ast.Call, str]]:
    """Every rows() call with the test it marks; decorators may hold it inside pytest.param(marks=...)."""
    bodies: list[tuple[list[ast.stmt], str]] = [(tree.body, file)]
    while bodies:
        body, owner = bodies.pop()
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                test = f"{owner}::{node.name}"
                for decorator in node.decorator_list:
                    yield from ((call, test) for call in _rows_calls(decorator))
                if isinstance(node, ast.ClassDef):
                    bodies.append((node.body, test))
            elif isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == "pytestmark" for target in node.targets
            ):
                yield from ((call, owner) for call in _rows_calls(node.value))


def held_by(markers: Sequence[Marker]) -> dict[str, list[str]]:
    """The tests of each id, sorted."""
    tests: dict[str, set[str]] = {}
    for marker in markers:
        tests.setdefault(marker.id, set()).add(marker.test)
    return {one: sorted(names) for one, names in tests.items()}


def unknown_ids(table: Table, markers: Sequence[Marker]) -> list[str]:
    """One line for every marker whose id is no promise."""
    return [
        f"{marker.test}: {marker.id} is no promise of {TABLE.as_posix()}"
        for marker in markers
        if marker.id not in table.promises
    ]


def _held_cell(tests: Sequence[str]) -> str:
    return "<br>".join(f"`{test}`" for test in tests)


def with_tests(text: str, tests: dict[str, list[str]]) -> str:
    """The page with the last cell of every promise made from `tests`; all else stays as it is."""
    lines = []
    for line in text.splitlines():
        cells = _cells(line)
        if len(cells) == 4 and _ID.fullmatch(cells[0]):
            held = _held_cell(tests.get(cells[0], []))
            line = f"| {cells[0]} | {cells[1]} | {cells[2]} | {held} |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def report(table: Table, tests: dict[str, list[str]]) -> Iterator[str]:
    """What holds and what does not yet, in lines."""
    plain = [one for one in table.promises.values() if not one.needs]
    special = [one for one in table.promises.values() if one.needs]
    open_ones = [one for one in plain if one.id not in tests]
    yield f"{len(plain) - len(open_ones)} of {len(plain)} promises are held by tests"
    if open_ones:
        yield f"no test yet ({len(open_ones)}):"
        yield from (f"  {one.id:5} {one.text}" for one in open_ones)
    if special:
        yield f"full proof needs more than a CPU and the bundled model ({len(special)}):"
        for one in special:
            shown = "shown in part" if one.id in tests else "no test"
            yield f"  {one.id:5} {one.text} [{one.needs}; {shown}]"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="fill in the 'held by' column of the page")
    action.add_argument(
        "--check", action="store_true", help="exit status 1 if that column is out of date or a marker is wrong"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository to look at (default: this one)")
    args = parser.parse_args(argv)

    page = args.root / TABLE
    text = page.read_text(encoding="utf-8")
    table = read_table(text)
    markers, problems = find_markers(args.root)
    problems = [*table.problems, *problems, *unknown_ids(table, markers)]
    tests = held_by(markers)
    fresh = with_tests(text, tests)
    if args.write and fresh != text:
        page.write_text(fresh, encoding="utf-8", newline="\n")
    if args.check and fresh != text:
        problems.append(
            f"{TABLE.as_posix()}: the 'held by' column is out of date; run: python tools/promises.py --write"
        )
    if not args.check:
        print("\n".join(report(table, tests)))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if args.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())
