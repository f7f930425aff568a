"""The flags of train_network.py are the ecosystem's: same names, defaults, types, choices and numbers of values."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from library.options.base import options_of
from library.options.parsing import build_parser

FACTS = {row["dest"]: row for row in json.loads((Path(__file__).parent / "train_network_flags.json").read_text())}
OURS = {"strict", "data_index_dir"}  # options that earlier trainers do not have
ADDED_CHOICES = {"max_token_length": {75}}  # means the same as leaving it out
ROOT = Path(__file__).parents[2]


@pytest.fixture
def actions(groups):
    parser = build_parser(groups, prog="train_network.py")
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def test_no_flag_is_missing_and_new_ones_are_known(actions):
    assert sorted(actions) == sorted(FACTS.keys() | OURS)
    assert len(FACTS) == 193


@pytest.mark.rows("R26", "R27", "R137", "R177", "R194", "R199", "R200", "R258", "R259", "R261")
@pytest.mark.parametrize("dest", FACTS)
def test_flag_is_as_it_was(actions, dest):
    fact, action = FACTS[dest], actions[dest]
    assert list(action.option_strings) == fact.get("flags", [f"--{dest}"])
    assert action.default == fact["default"]
    assert type(action.default) is type(fact["default"]) or {type(action.default), type(fact["default"])} == {
        int,
        float,
    }
    assert action.nargs == fact.get("nargs")
    if fact.get("nargs") == 0:
        assert action.const is True
    else:
        assert action.type.__name__ == fact["type"]
    choices = set(action.choices or ()) - {None}
    assert choices - ADDED_CHOICES.get(dest, set()) == set(fact.get("choices") or ()) - {None}


def test_every_option_is_explained_in_one_line(groups):
    for group in groups:
        for option in options_of(group):
            words = option.details.help.split()
            assert len(words) >= 2, option.dest
            assert "\n" not in option.details.help


@pytest.mark.rows("R4")
def test_help_shows_every_flag_and_exits_with_0(groups, capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser(groups, prog="train_network.py").parse_args(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{dest}" in shown for dest in FACTS)


def test_parsing_and_checking_import_nothing_heavy():
    """The time is the processor's for the whole of it, measured inside: start-up of Python is not ours."""
    code = """
import sys, time
start = time.process_time()
from library.options.parsing import build_parser, parse_options
from library.options.scripts import groups_for, traits_for
from library.options.validation import problems, warnings
groups = groups_for("sd", "network")
build_parser(groups).format_help()
opts = parse_options(groups, ["--network_dim=4"])
problems(opts, traits_for("sd")), warnings(opts, traits_for("sd"))
heavy = {"torch", "numpy", "diffusers", "transformers", "PIL", "accelerate", "cv2"} & set(sys.modules)
print(time.process_time() - start, *heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, *heavy = done.stdout.split()
    assert heavy == []
    assert float(seconds) < 1.0
