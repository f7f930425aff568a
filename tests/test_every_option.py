"""Every option of every script with the ends of its range, nothing, far too much, and paths to what is no file.

Whatever a value is, a script takes it or says in lines of its own what is wrong; no other exception reaches the user.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from library import checking, registry
from library.errors import UserError
from library.options import parsing, scripts, validation
from library.options.base import Option, options_of
from library.runtime import logs
from tools.option_tables import preparation_groups, preparation_scripts

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny_model" / "tiny-sd.safetensors"
TRAINING = [
    (script, family, method) for family in registry.FAMILIES for script, method in scripts.scripts_of(family).items()
]
PREPARATION = {f"{script.parent.name}/{script.stem}": script for script in preparation_scripts()}
EXITS = ("output_config",)  # writes a file and ends the script


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A folder of images, and paths of every kind that a user may give by mistake."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "data" / "1_cat").mkdir(parents=True)
    for number in range(2):
        pixels = np.full((64, 64, 3), 40 * number, np.uint8)
        Image.fromarray(pixels).save(folder / "data" / "1_cat" / f"{number}.png")
        (folder / "data" / "1_cat" / f"{number}.txt").write_text("a cat, sitting")
    os.mkfifo(folder / "pipe")
    (folder / "empty folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "empty").write_bytes(b"")
    (folder / "text").write_text("nothing [ of } use")
    return {path.name: path for path in folder.iterdir()}


def numbers(option: Option) -> Iterator[str]:
    """Ends of the range with what lies beside them, and numbers that no machine can use."""
    yield from ("", "0", "-1", "nan", "-inf", "9" * 30, "9" * 5000, "1e308")
    limits = option.details
    step = 1 if option.kind == "int" else 1e-6
    for limit in (limits.at_least, limits.above, limits.at_most, limits.below):
        if limit is not None:
            yield from (f"{limit - step:.12g}", f"{limit:.12g}", f"{limit + step:.12g}")


def texts(places: dict[str, Path]) -> Iterator[str]:
    yield from ("", "x" * 300, "x" * 5000, "a\x1b[2Jb\nc", "a\0b", "\udce9", "/", "1,", "lr=" + "9" * 400, "/dev/zero")
    yield from (str(places[name]) for name in ("pipe", "loop", "empty", "text", "empty folder", "data"))
    yield from (f"{places['text']}/below", f"{places['empty folder']}/{'x' * 300}")


def values_of(option: Option, places: dict[str, Path]) -> list[str]:
    if option.choices:
        return ["", "nonsense", "x" * 5000, *map(str, option.choices)]
    return list(dict.fromkeys(numbers(option) if option.kind in ("int", "float", "int_or_float") else texts(places)))


def words_for(option: Option, value: str) -> list[str]:
    if option.kind == "bool":
        return [option.flag]
    return [option.flag, value] if option.many else [f"{option.flag}={value}"]


def table(options: Iterable[Option], places: dict[str, Path]) -> Iterator[list[str]]:
    """The words of every case, for options that are given by a flag."""
    for option in options:
        if option.dest in EXITS or option.details.positional:
            continue
        cases = [""] if option.kind == "bool" else values_of(option, places)
        yield from (words_for(option, value) for value in cases)


def require_plain(problems: list[str] | tuple[str, ...], words: list[str]) -> None:
    """Problems are lines that a screen may show, and none repeats thousands of letters."""
    shown = UserError(*problems).render()
    assert problems, words
    assert len(shown) < 4000 + 1000 * len(problems), words
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", shown), words


def run_all(cases: Iterator[list[str]], check: Callable[[list[str]], Any]) -> tuple[int, int]:
    """How many cases are taken and refused. Every other end of one is a failure, and all are told."""
    taken, refused, faults = 0, 0, []
    for words in cases:
        try:
            check(words)
            taken += 1
        except UserError as error:
            require_plain(error.problems, words)
            refused += 1
        except Exception as error:
            faults.append(f"{[word[:80] for word in words]}: {type(error).__name__}: {str(error)[:200]}")
    assert not faults, f"{len(faults)} of {taken + refused + len(faults)}\n" + "\n".join(faults)
    return taken, refused


def base_words(places: dict[str, Path], method: str) -> list[str]:
    words = [
        f"--pretrained_model_name_or_path={MODEL}", f"--output_dir={places['empty folder']}", "--resolution=64",
        f"--train_data_dir={places['data']}", "--max_train_steps=1", "--learning_rate=1e-3", "--enable_bucket",
        "--min_bucket_reso=64", "--max_data_loader_n_workers=0", "--seed=1",
    ]  # fmt: skip
    return [*words, "--network_module=networks.lora"] if method == "network" else words


def test_no_value_of_a_training_option_ends_in_a_traceback(places, monkeypatch):
    monkeypatch.chdir(places["empty folder"])
    logs.setup_logging("CRITICAL")
    seen: list[Option] = []
    taken = refused = 0
    for script, family, method in TRAINING:
        groups, traits = scripts.groups_for(family, method), scripts.traits_for(family)
        parser = parsing.build_parser(groups, prog=script)
        fresh = [option for group in groups for option in options_of(group) if option not in seen]
        seen += fresh

        def check(words, parser=parser, family=family, method=method, traits=traits) -> None:
            options = parsing.parse_options(parser, [*base_words(places, method), *words], elsewhere=dict)
            checking.check(registry.follow_model(family, options), family, method, traits)

        counts = run_all(table(fresh, places), check)
        taken, refused = taken + counts[0], refused + counts[1]
    assert taken > 500
    assert refused > 500


@pytest.mark.parametrize("script", PREPARATION)
def test_no_value_of_a_preparation_option_ends_in_a_traceback(script, places, monkeypatch):
    monkeypatch.chdir(places["empty folder"])
    groups = preparation_groups(PREPARATION[script])
    parser = parsing.build_parser(groups, prog=script)
    by_place = [option for group in groups for option in options_of(group) if option.details.positional]
    required = [f"--{o.dest}=x" for group in groups for o in options_of(group) if o.details.required]

    def check(words: list[str]) -> None:
        options = parsing.parse_options(parser, [*["x"] * len(by_place), *required, *words])
        problems = validation.problems(options, scripts.traits_for("sd"))
        if problems:
            raise UserError(*problems)

    taken, refused = run_all(table([o for g in groups for o in options_of(g)], places), check)
    assert taken + refused > 20
