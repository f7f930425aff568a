"""Options as a namespace: what a parser, a file and a program have put into it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

import train_network
from library import embedding
from library.flux_train_utils import add_flux_train_arguments
from library.train_util import read_config_from_file


@pytest.fixture
def parser(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["wrapper.py"])
    return train_network.setup_parser()


@pytest.fixture
def given(monkeypatch):
    """What a training is given from a namespace: the options that count as given."""

    def options(args: argparse.Namespace) -> dict[str, object]:
        found = []
        monkeypatch.setattr("library.cli._train", lambda family, method, argv, options: found.append(options))
        embedding.train(args, **train_network.SCRIPT)
        return {name: found[0].flat()[name] for name in found[0].explicit}

    return options


def test_defaults_count_as_not_given(parser, given):
    assert given(parser.parse_args([])) == {}
    args = parser.parse_args(["--network_dim=8", "--max_train_epochs=2", "--sdpa", "--network_args", "a=1", "b=2"])
    assert given(args) == {"network_dim": 8, "max_train_epochs": 2, "sdpa": True, "network_args": ["a=1", "b=2"]}


def test_values_that_a_program_has_set(parser, given):
    args = parser.parse_args([])
    values = {
        "learning_rate": "1e-4",  # text, as forms have it
        "network_dim": "16",
        "train_data_dir": Path("images"),
        "network_args": ("conv_dim=4",),
        "cache_latents": True,
        "seed": None,
        "output_name": "",
        "made_up": 3,
    }
    for name, value in values.items():
        setattr(args, name, value)
    found = given(args)
    assert found.pop("output_name", None) in (None, "")
    assert str(found.pop("train_data_dir")) == "images"
    assert found == {"learning_rate": 1e-4, "network_dim": 16, "network_args": ["conv_dim=4"], "cache_latents": True}


def test_a_wrong_value_is_one_line(parser, capsys):
    args = parser.parse_args([])
    args.network_dim, args.cache_latents = "many", 5
    with pytest.raises(SystemExit) as ended:
        embedding.train(args, **train_network.SCRIPT)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "--network_dim: must be a whole number, got 'many'" in told
    assert "--cache_latents: must be true or false, got 5" in told


def test_what_wins_over_a_file(parser, tmp_path, monkeypatch):
    file = tmp_path / "run.toml"
    file.write_text('[a]\nnetwork_dim = 8\nnetwork_alpha = 8\nseed = 3\noutput_name = "x"\n[b]\nsdpa = true\n')
    monkeypatch.setattr(sys, "argv", ["wrapper.py", f"--config_file={file}", "--network_dim=2", "--network_alpha=1"])
    args = parser.parse_args()
    args.output_name = "set by the program"
    args = read_config_from_file(args, parser)
    assert (args.network_dim, args.network_alpha, args.seed, args.sdpa) == (2, 1.0, 3, True)
    assert args.output_name == "set by the program"


def test_no_file(parser):
    args = parser.parse_args([])
    assert read_config_from_file(args, parser) is args


def test_mistakes_end_as_those_of_a_script(parser, tmp_path, capsys):
    for line, message in (
        (["--network_dim=x"], "--network_dim: must be a whole number"),
        (["--no_such_option"], "no_such_option"),
    ):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(line)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        read_config_from_file(parser.parse_args([f"--config_file={tmp_path / 'none.toml'}"]), parser)
    assert ended.value.code == 2
    assert "--config_file: there is no file" in capsys.readouterr().err


def test_options_are_added_to_any_parser():
    plain = argparse.ArgumentParser()
    plain.add_argument("--guidance_scale", type=float, default=7.0)
    add_flux_train_arguments(plain)
    args = plain.parse_args(["--clip_l=a", "--t5xxl=b", "--ae=c"])
    assert (args.clip_l, args.t5xxl, args.ae, args.guidance_scale) == ("a", "b", "c", 7.0)
    assert not hasattr(args, "network_dim")
