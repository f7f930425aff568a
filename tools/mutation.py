"""Mutation testing: which small faults in a module would its tests not notice?

`python tools/mutation.py library/objectives` changes one operator, constant, comparison, condition, argument or call at
a time and runs the mirror test module, tests/objectives/test_<name>.py, on each mutant until a test fails. Survivors
are printed: sharpen a test for each, unless the mutant is equivalent. Tests that start a script do not see mutants.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import gc
import importlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OURS = {path.stem for path in ROOT.iterdir()}  # everything else is imported once, before the children are forked
PAIRS = ["Add Sub", "Mult Div", "BitOr BitAnd", "And Or", "Lt LtE", "Gt GtE", "Eq NotEq", "Is IsNot", "In NotIn"]
SWAPS = {"FloorDiv": "Div", "Mod": "Mult", "Pow": "Mult"}
SWAPS |= {one: other for pair in PAIRS for one, other in (pair.split(), pair.split()[::-1])}


class Mutant(NamedTuple):
    line: int
    change: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """Every mutant of a module, in the order of its lines."""
    tree = ast.parse(source)
    for holder, key, node in _slots(tree):
        for other in _alternatives(node):
            holder[key] = other
            change = f"{ast.unparse(node)}  ->  {ast.unparse(other)}"
            yield Mutant(getattr(node, "lineno", 0), change, ast.unparse(tree))
        holder[key] = node


def _slots(node: ast.AST) -> Iterator[tuple[Any, Any, ast.AST]]:
    """(container, key, node) of all nodes that run and do more than guard, as the `strict` of zip does."""
    for name, value in ast.iter_fields(node):
        holder, keys = (value, range(len(value))) if isinstance(value, list) else (vars(node), [name])
        for key in keys if name not in ("annotation", "returns", "decorator_list") else ():
            child = holder[key]
            types_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            if isinstance(child, ast.AST) and not types_only and getattr(child, "arg", "") != "strict":
                yield holder, key, child
                yield from _slots(child)


def _alternatives(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op).__name__ in SWAPS:
            yield _changed(node, op=_swapped(op))
        case ast.Compare(ops=[op, *more]) if type(op).__name__ in SWAPS:
            yield _changed(node, ops=[_swapped(op), *more])
        case ast.UnaryOp():
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1)
        case ast.If(test=test) | ast.IfExp(test=test) if not isinstance(test, ast.Compare | ast.UnaryOp):
            yield _changed(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Continue() | ast.Break():
            yield ast.Pass()
        case ast.Call(func=func, keywords=keywords):
            for number, keyword in enumerate(keywords):
                if keyword.arg != "strict":
                    yield _changed(node, keywords=keywords[:number] + keywords[number + 1 :])
            if isinstance(func, ast.Attribute):
                yield func.value


def _swapped(op: ast.AST) -> ast.AST:
    return getattr(ast, SWAPS[type(op).__name__])()


def _changed(node: ast.AST, **fields: Any) -> ast.AST:
    other = copy.copy(node)
    vars(other).update(fields)
    return other


class _Loader(SourceFileLoader):
    """Gives `source` in place of the module's own, and finds that module only."""

    source = ""

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec")

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None


def run_tests(tests: Sequence[str], module: Path, source: str, seconds: int, imported: Path | None = None) -> int:
    """pytest's exit status in a forked child where `module` has this source; negative where the time ran out.

    The names of all modules that the child imported are written to `imported`.
    """
    pid = os.fork()
    if pid == 0:
        signal.alarm(seconds)
        for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
            del sys.modules[name]  # where tests of ours run this: what they imported is imported again
        loader = _Loader(".".join(module.with_suffix("").parts).removesuffix(".__init__"), str(ROOT / module))
        loader.source = source
        sys.meta_path.insert(0, loader)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        import pytest

        status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
        if imported is not None:
            imported.write_text("\n".join(sys.modules))
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def survivors(module: Path, tests: Sequence[str], sample: int | None = None) -> tuple[int, list[Mutant]]:
    """How many mutants were tried, and those that no test notices.

    Raises: SystemExit: the tests fail without a mutant.
    """
    source = (ROOT / module).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:  # several may run in one checkout
        imported = Path(folder, "imported")
        if status := run_tests(tests, module, source, 3600, imported):
            raise SystemExit(f"{module}: {' '.join(tests)} ends with status {status} without a mutant")
        names = imported.read_text().split()
    for name in names:
        if name.split(".")[0] not in OURS:
            with contextlib.suppress(Exception):  # what cannot be imported alone is imported by the tests
                importlib.import_module(name)
    gc.freeze()  # or each child's collector would visit, and so copy, all that was imported
    start = time.monotonic()
    run_tests(tests, module, source, 3600)
    limit = 10 + round(5 * (time.monotonic() - start))
    found = sampled(list(mutants(source)), sample)
    return len(found), [mutant for mutant in found if run_tests(tests, module, mutant.source, limit) == 0]


def sampled(found: list[Mutant], sample: int | None) -> list[Mutant]:
    """At most `sample` of the mutants, at equal distances; all of them with None."""
    return found if sample is None else found[:: max(1, -(-len(found) // sample))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", type=Path, help="files or folders, from the repository's root")
    parser.add_argument("--tests", nargs="+", help="test files in place of the mirror test module")
    parser.add_argument("--sample", type=int, metavar="N", help="at most N mutants of each module, at equal distances")
    chosen = parser.parse_args(argv)
    if chosen.sample is not None and chosen.sample < 1:
        parser.error(f"--sample: must be at least 1, got {chosen.sample}")
    os.chdir(ROOT)
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")  # read when packages are imported
    sys.path.insert(0, str(ROOT))
    for module in (file for path in chosen.modules for file in (sorted(path.rglob("*.py")) or [path])):
        *folders, name = module.parts[module.parts[0] == "library" :]
        tests = chosen.tests or [str(Path("tests", *folders, f"test_{name}"))]
        if not Path(tests[0]).exists():
            print(f"{module}: there is no {tests[0]}; name its tests with --tests")
            continue
        count, left = survivors(module, tests, chosen.sample)
        print(f"{module}: {count - len(left)} of {count} mutants killed", flush=True)
        for mutant in left:
            print(f"  {module}:{mutant.line}: {mutant.change}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
