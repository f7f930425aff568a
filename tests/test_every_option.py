"""Every option of every script with the ends of its range, nothing, far too much, and paths to what is no file.

Whatever a value is, and whether it comes from the command line or from a configuration file, a script takes it or says
in lines of its own what is wrong; no other exception reaches the user.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from library import checking, cli, registry
from library.errors import UserError
from library.options import parsing, validation
from library.options.base import Option, options_of
from library.runtime import logs
from tools.option_tables import preparation_groups, preparation_scripts

ROOT = Path(__file__).resolve().parent.parent
TRAINING = [
    (script, family, method)
    for family in registry.FAMILIES
    for script, method in registry.FAMILIES[family].scripts.items()
]
PREPARATION = {f"{script.parent.name}/{script.stem}": script for script in preparation_scripts()}
EXITS = ("output_config",)  # writes a file and ends the script
CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
OF_METHOD = {
    "network": ["--network_module=networks.lora"],
    "embedding": ["--token_string=zwx"],
    "xti": ["--token_string=zwx"],
}
IN_A_MODEL = (  # what a Stable Diffusion 1.x file is recognised by; few names, as thousands of cases read them
    "model.diffusion_model.input_blocks.0.0.weight",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    "first_stage_model.decoder.conv_in.weight",
)
# Values of a configuration file that no word of a command line is, and what parsers and forms make of numbers.
TYPES = (
    '""', r'"a\u001b[2Jb\nc"', r'"a\u0000b"', "0", "-1", "9" * 400, "0.5", "nan", "true", "false", "[]", "[1, 2.5]",
    '["", 0, true, [1], {a = 1}]', "1979-05-27", "07:32:00", "{a = 1, train_inpainting = true}", "[{a = 1}]",
)  # fmt: skip


@pytest.fixture(scope="module")
def memory(tmp_path_factory) -> Iterator[Path]:
    """A folder, in memory where there is such a place: each case tries the output's names, and disks take longest."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path_factory.mktemp("memory")
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def places(memory) -> dict[str, Path]:
    """A folder of images, and paths of every kind that a user may give by mistake."""
    folder = memory / "places"
    folder.mkdir()
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
    (folder / "prompts.toml").write_text("[[prompts]]\ntarget = 'a cat'\n")
    save_file({name: np.zeros((4, 4, 3, 3), np.float16) for name in IN_A_MODEL}, folder / "model.safetensors")
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


def lines_of(option: Option) -> Iterator[str]:
    """An option in a configuration file: values of every type, and numbers around the ends of its range."""
    ends = numbers(option) if option.kind in ("int", "float", "int_or_float") else ()
    for value in dict.fromkeys(
        [*TYPES, *(text for text in ends if 0 < len(text) < 40), *(json.dumps(choice) for choice in option.choices)]
    ):
        yield f"{option.dest} = {value}"


def require_plain(problems: list[str] | tuple[str, ...], words: list[str]) -> None:
    """Problems are lines that a screen may show, and none repeats thousands of letters."""
    shown = UserError(*problems).render()
    assert problems, words
    assert len(shown) < 4000 + 1000 * len(problems), words
    assert not CONTROLS.search(shown.replace("\n", "")), words


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
        f"--pretrained_model_name_or_path={places['model.safetensors']}", f"--output_dir={places['empty folder']}",
        f"--train_data_dir={places['data']}", "--resolution=64", "--max_train_steps=1", "--learning_rate=1e-3",
        "--enable_bucket", "--min_bucket_reso=64", "--max_data_loader_n_workers=0", "--seed=1",
    ]  # fmt: skip
    if method == "leco":  # prompts in place of images
        of_images = ("--train_data_dir", "--resolution", "--enable_bucket", "--min_bucket_reso")
        words = [word for word in words if not word.startswith(of_images)] + [
            f"--prompts_file={places['prompts.toml']}"
        ]
    return [*words, *OF_METHOD.get(method, ())]


def test_no_value_of_a_training_option_ends_in_a_traceback(places, monkeypatch):
    monkeypatch.chdir(places["empty folder"])
    logs.setup_logging("CRITICAL")
    seen: list[Option] = []
    taken = refused = 0
    for script, family, method in TRAINING:
        groups, traits = registry.groups_for(family, method), registry.FAMILIES[family].traits
        parser = parsing.build_parser(groups, prog=script)
        fresh = [option for group in groups for option in options_of(group) if option not in seen]
        seen += fresh

        def check(words, parser=parser, family=family, method=method, traits=traits) -> None:
            options = parsing.parse_options(parser, [*base_words(places, method), *words], elsewhere=dict)
            spec, way = registry.FAMILIES[family], registry.METHODS[method]
            checking.check(way.complete_options(spec.complete_options(options)), spec, way)

        counts = run_all(table(fresh, places), check)
        taken, refused = taken + counts[0], refused + counts[1]
    assert taken > 500
    assert refused > 500


def test_no_value_of_a_configuration_file_ends_in_a_traceback(places, monkeypatch, memory, capsys):
    """Each file by itself, through what makes lines and an exit status of errors."""
    monkeypatch.chdir(places["empty folder"])
    logs.setup_logging("CRITICAL")
    file = memory / "run.toml"
    seen: list[Option] = []
    taken = refused = 0
    for script, family, method in TRAINING:
        groups, traits = registry.groups_for(family, method), registry.FAMILIES[family].traits
        parser = parsing.build_parser(groups, prog=script)
        fresh = [option for group in groups for option in options_of(group) if option not in seen]
        seen += fresh

        def check(line, parser=parser, family=family, method=method, traits=traits) -> None:
            file.write_text(line, encoding="utf-8")
            given = [word for word in base_words(places, method) if not word.startswith(f"--{line.split()[0]}=")]
            with cli.ending_as_a_script():
                options = parsing.parse_options(parser, [*given, f"--config_file={file}"], elsewhere=dict)
                spec, way = registry.FAMILIES[family], registry.METHODS[method]
                checking.check(way.complete_options(spec.complete_options(options)), spec, way)

        for line in (line for option in fresh for line in lines_of(option)):
            status: Any = 0
            try:
                check(line)
            except SystemExit as end:
                status = end.code
            except Exception as error:
                raise AssertionError(f"{line[:200]}: {type(error).__name__}: {error}") from error
            shown = capsys.readouterr().err
            taken, refused = taken + (status == 0), refused + (status == 2)
            assert status in (0, 2), line
            assert not CONTROLS.search(shown.replace("\n", "")), line
            assert status == 0 or re.fullmatch(r"error: [^\n]+\n(  [^\n]+\n)*", shown), line
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
        problems = validation.problems(options, registry.FAMILIES["sd"].traits)
        if problems:
            raise UserError(*problems)

    taken, refused = run_all(table([o for g in groups for o in options_of(g)], places), check)
    assert taken + refused > 20
