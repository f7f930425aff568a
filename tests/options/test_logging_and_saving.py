"""The options of trackers and of the hub: what is refused, what is warned about, and what the command line tells."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from library import cli
from library.errors import UserError
from library.options.base import options_of
from library.options.logging import absolute_paths, read_tracker_config
from library.options.parsing import parse_options
from library.options.saving import HubFolder, parse_hub_folder
from library.options.validation import problems, warnings
from library.runtime.logs import LOGGER, setup_logging


@pytest.mark.parametrize(
    ("flags", "trackers"),
    [
        ([], ()),
        (["--logging_dir=logs"], ("tensorboard",)),
        (["--log_with=tensorboard", "--logging_dir=logs"], ("tensorboard",)),
        (["--log_with=wandb"], ("wandb",)),
        (["--log_with=wandb", "--logging_dir=logs"], ("wandb",)),
        (["--log_with=all", "--logging_dir=logs"], ("tensorboard", "wandb")),
    ],
)
def test_where_curves_go(valid, traits, flags, trackers):
    pytest.importorskip("wandb")
    opts = valid(*flags)
    assert opts.logging.trackers == trackers
    assert problems(opts, traits) == []


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--log_with=all", "--log_with: all needs --logging_dir"),
        ("--log_with=tensorboard", "--log_with: tensorboard needs --logging_dir"),
        ("--log_tracker_config=no.toml", "--log_tracker_config: there is no file 'no.toml'"),
        ("--huggingface_repo_id=a/b/c", "--huggingface_repo_id: must be user/name, got 'a/b/c'"),
        ("--huggingface_repo_id=me/a--b", "--huggingface_repo_id: must be user/name"),
        ("--huggingface_repo_id=me/b.git", "--huggingface_repo_id: must be user/name"),
        ("--huggingface_repo_id=https://huggingface.co/me/b", "--huggingface_repo_id: must be user/name"),
        (
            "--huggingface_repo_id=a/b --huggingface_repo_type=space",
            "--huggingface_repo_type: must be model or dataset, got 'space'",
        ),
        (
            "--huggingface_repo_id=a/b --huggingface_path_in_repo=../x",
            "--huggingface_path_in_repo: must not contain ..",
        ),
        ("--save_state_to_huggingface", "--save_state_to_huggingface: needs --huggingface_repo_id"),
        ("--resume_from_huggingface", "--resume_from_huggingface: needs --resume user/name/folder"),
        ("--resume_from_huggingface --resume=me/style", "--resume_from_huggingface: --resume must be user/name/folder"),
    ],
)
def test_refused(valid, traits, tmp_path, monkeypatch, flags, problem):
    monkeypatch.chdir(tmp_path)
    assert [line for line in problems(valid(*flags.split()), traits) if line.startswith(problem)]


def test_what_is_not_public_is_private(valid, traits):
    opts = valid("--huggingface_repo_id=a/b", "--huggingface_repo_visibility=secret")
    assert problems(opts, traits) == []
    assert "'secret' is not public, so private is used" in "".join(warnings(opts, traits))
    assert problems(valid("--huggingface_repo_visibility=secret", "--huggingface_repo_type=space"), traits) == []


def test_names_that_the_hub_takes(valid, traits):
    for name in ("me/style", "style", "My_Name/a.b-c_1"):
        assert problems(valid(f"--huggingface_repo_id={name}"), traits) == []


@pytest.mark.parametrize("flag", ["--log_with=wandb", "--log_with=all"])
def test_wandb_must_be_installed(valid, traits, monkeypatch, flag):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not there
    (line,) = problems(valid(flag, "--logging_dir=logs"), traits)
    assert line.startswith(f"{flag.replace('=', ': ')} needs the package wandb, which is not installed; run: ")
    assert line.endswith("-m pip install -r requirements/wandb.txt")


def test_the_folder_that_wandb_makes_is_not_the_package(valid, traits, monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    assert [line for line in problems(valid("--log_with=wandb"), traits) if "needs the package wandb" in line]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[wandb", "is not valid TOML"),
        ('[comet]\nname = "x"', "'comet' in {} is no tracker; use [tensorboard] and [wandb]"),
        ("tags = 1", "'tags' in {} is no tracker"),
        ("[wandb]\ntaggs = []", "unknown key 'taggs' in [wandb] of {}; did you mean"),
        ("[tensorboard]\nflush = 1", "unknown key 'flush' in [tensorboard] of {}"),
    ],
)
def test_a_tracker_config_is_read_before_anything_else(valid, traits, tmp_path, text, problem):
    pytest.importorskip("wandb")
    file = tmp_path / "trackers.toml"
    file.write_text(text, encoding="utf-8")
    (line,) = problems(valid("--log_with=all", "--logging_dir=logs", f"--log_tracker_config={file}"), traits)
    assert line.startswith("--log_tracker_config: ")
    assert problem.format(file) in line


def test_a_tracker_config_may_speak_of_a_tracker_that_is_not_used(valid, traits, tmp_path):
    file = tmp_path / "trackers.toml"
    file.write_text("[wandb]\nof_another_version = 1\n[tensorboard]\nflush_secs = 3\n", encoding="utf-8")
    assert problems(valid("--logging_dir=logs", f"--log_tracker_config={file}"), traits) == []
    assert read_tracker_config(str(file), ("tensorboard",))["tensorboard"] == {"flush_secs": 3}


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        ("--log_prefix=x --log_with=wandb", "--log_prefix: has no effect without --logging_dir and TensorBoard"),
        ("--log_config", "--log_config: has no effect without --logging_dir or --log_with wandb"),
        ("--wandb_run_name=x --logging_dir=l", "--wandb_run_name: has no effect without --log_with wandb or all"),
        ("--async_upload", "--async_upload: has no effect without --huggingface_repo_id"),
        ("--huggingface_repo_id=a/b --save_state_to_huggingface", "--save_state_to_huggingface: no state is saved"),
    ],
)
def test_warned_about(valid, traits, flags, warning):
    (line,) = warnings(valid(*flags.split()), traits)
    assert line.startswith(warning)


@pytest.mark.rows("R236", "R238")
def test_secrets_on_the_command_line_are_warned_about(valid, traits, tmp_path):
    flags = ("--log_with=wandb", "--huggingface_repo_id=me/style")
    lines = warnings(valid(*flags, "--wandb_api_key=abc123", "--huggingface_token=hf_abc123"), traits)
    assert sorted(line.split(":")[0] for line in lines) == ["--huggingface_token", "--wandb_api_key"]
    for line, variable in zip(sorted(lines), ("HF_TOKEN", "WANDB_API_KEY"), strict=True):
        assert "Weights & Biases stores command lines" in line
        assert f"put it into a --config_file, or set {variable} in the environment" in line
        assert "abc123" not in line
    file = tmp_path / "keys.toml"
    file.write_text('wandb_api_key = "abc123"\nhuggingface_token = "hf_abc123"\n', encoding="utf-8")
    assert warnings(valid(*flags, f"--config_file={file}"), traits) == []


KEY = "of-mine.7f3a09"  # looks like no token and no key: only where it stands makes it a secret
TOKEN = "hf_" + "aB3" * 11 + "x"


@pytest.mark.parametrize("name", ["huggingface_token", "wandb_api_key"])
@pytest.mark.parametrize(
    "value",
    [
        f'["{KEY}"]', f'[["{KEY}", 1], {{a = "{KEY}"}}]', f'{{a = "{KEY}"}}', f'{{"{KEY}" = 1}}', f'[{{a = "{KEY}"}}]',
        "20240527073200", "73200.625", "1979-05-27T07:32:00Z", f"hf_{KEY}", f'"{KEY}', f"'{KEY}\\x1b",
    ],
)  # fmt: skip
def test_a_secret_of_another_type_is_not_repeated(groups, tmp_path, capsys, name, value):
    file = tmp_path / "keys.toml"
    file.write_text(f"{name} = {value}\nhuggingface_repo_id = 'me/style'\n", encoding="utf-8")
    setup_logging(simple=True)
    try:
        for line in parse_options(groups, [f"--config_file={file}"]).remarks:
            LOGGER.warning("%s", line)
    except UserError as error:
        print(error.render(), error, repr(error.problems))
    said = "".join(capsys.readouterr())
    assert said
    for secret in (KEY, "20240527073200", "73200.625", "1979", "(1979, 5, 27"):
        assert secret not in said


@pytest.mark.parametrize(
    "words",
    [
        (TOKEN,), ("0123456789abcdef" * 2 + "01234567",), ("local-" + "a1" * 20,), ("--seed=1", TOKEN),
        (f"--seed={TOKEN}",), (f"--seeed={TOKEN}",), ("--huggingface_tokken", TOKEN), ("--network_args", TOKEN),
        ("--huggingface_token", "x", TOKEN), ("--loss_type", TOKEN), ("--resolution", TOKEN),
    ],
)  # fmt: skip
def test_a_secret_where_none_belongs_is_not_repeated(words, capsys):
    """Through the whole beginning of a script, up to its exit status."""
    with pytest.raises(SystemExit) as end:
        cli.run("sd", "network", [*words, "--train_data_dir=none", "--network_module=networks.lora"])
    assert end.value.code == 2
    said = "".join(capsys.readouterr())
    assert "error: " in said
    assert words[-1].rpartition("=")[2] not in said


@pytest.mark.rows("R238")
def test_absolute_paths_on_the_command_line_are_reported_with_wandb(valid, tmp_path, monkeypatch):
    paths = ("--vae=/models/vae.pt", "--network_weights=C:\\lora.safetensors", "--reg_data_dir=images")
    (line,) = absolute_paths(valid("--log_with=wandb", *paths, "--network_args", "file=/x", "conv_dim=2"))
    flags, rest = line.split(": ")
    assert flags == "--network_args, --network_weights, --vae"
    assert "relative ones reveal less" in rest
    assert absolute_paths(valid("--logging_dir=logs", *paths)) == []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text('vae = "/models/vae.pt"\n', encoding="utf-8")
    assert absolute_paths(valid("--log_with=wandb", "--config_file=run.toml")) == []


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("me/style/runs/a-state", HubFolder("me/style", "runs/a-state")),
        ("me/style/a-state:v1", HubFolder("me/style", "a-state", "v1")),
        ("me/style/a-state/:refs/pr/1:dataset", HubFolder("me/style", "a-state", "refs/pr/1", "dataset")),
    ],
)
def test_a_folder_at_the_hub(text, folder):
    assert parse_hub_folder(text) == folder


@pytest.mark.parametrize(
    "text", [None, "", "me", "me/style", "me/style/", "/a/b", "me/style/a:", "me/style/a:v:model:x"]
)
def test_no_folder_at_the_hub(text):
    with pytest.raises(ValueError, match="--resume"):
        parse_hub_folder(text)


def test_kinds_and_ways_out_of_the_folder_are_refused():
    with pytest.raises(ValueError, match="must be model or dataset, got 'space'"):
        parse_hub_folder("me/style/a:main:space")
    with pytest.raises(ValueError, match="must be user/name/folder"):
        parse_hub_folder("me/style/../a")


# ---- the guide


GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "logging.md").read_text("utf-8")


def test_the_guide_names_options_that_exist(groups):
    known = {option.flag for group in groups for option in options_of(group)} | {"--config_file", "--logdir"}
    assert set(re.findall(r"--\w+", GUIDE)) - known == set()
    own = {option.flag for group in groups for option in options_of(group) if group.group == "logging"}
    own |= {option.flag for group in groups for option in options_of(group) if "huggingface" in option.dest}
    assert {flag for flag in own if flag not in GUIDE and not flag.startswith("--console")} == set()


def test_the_commands_of_the_guide_are_complete(parse, traits, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    commands = re.findall(r"^```\npython train_network.py (.*?)^```$", GUIDE, flags=re.M | re.S)
    assert len(commands) == 2
    for command in commands:
        opts = parse(*shlex.split(command.replace("\\\n", " ")))
        assert problems(opts, traits) == []
        assert warnings(opts, traits) == []


def test_the_tracker_config_of_the_guide_is_one(tmp_path):
    pytest.importorskip("wandb")
    (text,) = re.findall(r"^```toml\n(.*?)^```$", GUIDE, flags=re.M | re.S)
    file = tmp_path / "trackers.toml"
    file.write_text(text, encoding="utf-8")
    assert read_tracker_config(str(file)).keys() == {"tensorboard", "wandb"}


def test_a_folder_that_takes_no_files_is_reported_before_training(valid, traits, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for place in (file, file / "below" / "it"):
        (line,) = problems(valid(f"--output_dir={place}"), traits)
        assert line == f"--output_dir: nothing can be saved to {place}: {file} is no folder"
        (line,) = problems(valid(f"--tokenizer_cache_dir={place}"), traits)
        assert line == f"--tokenizer_cache_dir: {place} cannot be made: {file} is no folder"
    for place in (tmp_path, tmp_path / "new" / "one"):
        assert problems(valid(f"--output_dir={place}", f"--tokenizer_cache_dir={place}"), traits) == []
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_a_folder_that_may_not_be_written_is_reported_before_training(valid, traits, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for place in (tmp_path, tmp_path / "new"):
        (line,) = problems(valid(f"--output_dir={place}"), traits)
        assert line == f"--output_dir: nothing can be saved to {place}: no permission to write to {tmp_path}"
