"""Which mutants the mutation run makes, and that one lives exactly where no test notices it."""

from __future__ import annotations

from pathlib import Path

from tools import mutation

SOURCE = """
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    LEVEL = 1


def f(x: int = 0, *, up: bool = True) -> int:
    if up:
        x.sort(reverse=True)
    return [*zip(x, x, strict=True)] if x + 2 < 3 else -x
"""


def test_every_kind_of_change():
    assert [mutant.change.replace("\n", "") for mutant in mutation.mutants(SOURCE)] == [
        "True  ->  False",
        "0  ->  1",
        "if up:    x.sort(reverse=True)  ->  if not up:    x.sort(reverse=True)",
        "x.sort(reverse=True)  ->  pass",
        "x.sort(reverse=True)  ->  x.sort()",
        "x.sort(reverse=True)  ->  x",
        "True  ->  False",
        "x + 2 < 3  ->  x + 2 <= 3",
        "x + 2  ->  x - 2",
        "2  ->  3",
        "3  ->  4",
        "-x  ->  x",
    ]
    for mutant in mutation.mutants(SOURCE):
        compile(mutant.source, "mutant", "exec")


def test_a_sample_has_mutants_at_equal_distances():
    found = list(mutation.mutants(SOURCE))
    assert mutation.sampled(found, None) == mutation.sampled(found, 12) == mutation.sampled(found, 99) == found
    assert mutation.sampled(found, 4) == [found[0], found[3], found[6], found[9]]
    assert mutation.sampled(found, 7) == found[::2]


def test_a_mutant_that_a_test_notices_is_killed():
    module = Path("library/objectives/masks.py")
    source = (mutation.ROOT / module).read_text(encoding="utf-8")
    tests = [str(mutation.ROOT / "tests/objectives/test_masks.py")]
    assert mutation.run_tests(tests, module, source, 600) == 0
    assert mutation.run_tests(tests, module, source.replace("loss * ", "loss + "), 600) == 1
