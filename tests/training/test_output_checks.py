"""What can only fail at the end of a run is refused at its beginning, and trying leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from library import cli
from library.options import validation
from library.options.parsing import parse_options
from library.registry import FAMILIES, groups_for
from library.training import output_checks
from tests.builders.rights import without_rights

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def problems(tmp_path):
    """What is said about an output name, after everything that the options alone tell."""

    def problems(name, *flags, method="network"):
        needed = [f"--output_dir={tmp_path / 'out'}", "--pretrained_model_name_or_path=m.safetensors", *flags]
        needed += [] if name is None else [f"--output_name={name}"]
        needed += ["--network_module=networks.lora"] if method == "network" else []
        opts = parse_options(groups_for("sd", method), [*needed, "--train_data_dir=d", "--resolution=64"])
        found = [
            line for line in validation.problems(opts, FAMILIES["sd"].traits) if line.startswith(("--output", "--log"))
        ]
        return found or output_checks.problems(opts)

    return problems


def everything(folder):
    return sorted((path.as_posix(), path.stat().st_mtime_ns) for path in folder.rglob("*") if not path.is_dir())


@pytest.mark.parametrize("method", ["network", "dreambooth"])
@pytest.mark.parametrize("name", [None, "m", "a/b", "v1.5 cat", "猫", "-x", "..x", "m" * 200])
def test_names_that_can_be_written_leave_no_trace(tmp_path, problems, name, method):
    assert problems(name, "--save_state", "--save_every_n_epochs=1", method=method) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "flags", "what"),
    [
        ("猫" * 84, (), ".safetensors"),
        ("m" * 300, (), ".safetensors"),
        ("m" * 244, (), "-step00000001-state"),  # what a signal leaves
        ("m" * 234, ("--save_every_n_steps=5",), "-step00000001.safetensors"),
        ("m" * 238, ("--save_every_n_epochs=1",), "-000001.safetensors"),
        ("m" * 237, ("--save_every_n_epochs=1", "--save_state"), "-000001-state"),
        ("m" * 240, ("--save_best_validation", "--validation_split=0.5"), "-best.safetensors"),
        ("x" * 300 + "/m", (), ""),
    ],
)
def test_names_that_are_too_long_for_one_of_the_files(tmp_path, problems, name, flags, what):
    found = problems(name, *flags)
    assert found
    assert all(line.startswith("--output_name: ") for line in found)
    assert all(line.endswith("cannot be made (File name too long); choose another name") for line in found)
    assert list(tmp_path.iterdir()) == []


def test_sample_images_are_shortened_not_refused(tmp_path, problems):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat")
    assert problems("m" * 225, f"--sample_prompts={prompts}", "--sample_every_n_steps=1") == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sample").write_text("a file")
    (line,) = problems("m", f"--sample_prompts={prompts}", "--sample_every_n_steps=1")
    assert f"{tmp_path / 'out' / 'sample'}" in line


@pytest.mark.parametrize("name", ["../x", "../../x", "/tmp/x", "a/../../x", "..//x", "a/../b", ".."])
def test_names_stay_below_the_output_folder(problems, name):
    (line,) = problems(name)
    assert line == f"--output_name: must stay below --output_dir, which names the place, got {name!r}"


@pytest.mark.parametrize("name", ["a/", "x\0y"])
def test_names_that_name_no_file(problems, name):
    (line,) = problems(name)
    assert line.startswith("--output_name: ")


def test_a_part_of_the_name_is_a_file(tmp_path, problems):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("mine")
    before = everything(tmp_path)
    found = problems("a/b")
    assert found
    assert all("cannot be made (" in line for line in found)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("there", "flags", "said"),
    [
        ("m.safetensors/", (), "m.safetensors is a folder"),
        ("m-step00000008.safetensors/", ("--save_every_n_steps=4",), "m-step00000008.safetensors is a folder"),
        ("m-000002.safetensors/", ("--save_every_n_epochs=1",), "m-000002.safetensors is a folder"),
        ("m-state", (), "m-state is a file"),
        ("m-step00000003-state", (), "m-step00000003-state is a file"),
        ("m-state/diary.txt", (), "m-state is a folder of something else"),
        ("m-state/optimizer.bin", (), None),
        ("m.safetensors", (), None),
        ("mine.safetensors/", (), None),
    ],
)
def test_something_of_another_kind_has_the_name(tmp_path, problems, there, flags, said):
    path = tmp_path / "out" / there
    path.parent.mkdir(parents=True)
    path.mkdir() if there.endswith("/") else path.write_text("mine")
    before = everything(tmp_path)
    found = problems("m", *flags)
    assert [said in line for line in found] == ([] if said is None else [True])
    assert everything(tmp_path) == before
    assert path.exists()


def test_a_folder_of_something_else_is_not_replaced_by_a_model(tmp_path, problems):
    (tmp_path / "out" / "m").mkdir(parents=True)
    (tmp_path / "out" / "m" / "diary.txt").write_text("mine")
    (line,) = problems("m", "--save_model_as=diffusers", method="dreambooth")
    assert "m is a folder of something else" in line


def test_no_room_for_one_copy(tmp_path, problems, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, 40 << 10))
    (line,) = problems("m")
    assert "takes about 1 MiB, and only 0 MiB are free; make room, or choose another --output_dir" in line
    model = tmp_path / "model.safetensors"
    with open(model, "wb") as file:
        file.truncate(300 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, 200 << 20))
    assert problems("m") == []
    (line,) = problems("m", f"--pretrained_model_name_or_path={model}", method="dreambooth")
    assert "takes about 300 MiB, and only 200 MiB are free" in line
    assert problems("m", f"--pretrained_model_name_or_path={model}", "--save_precision=fp16", method="dreambooth") == []


def test_a_kill_while_names_are_tried_leaves_nothing_that_looks_like_a_result(tmp_path, problems):
    made = []

    def watch(event, arguments):
        if watch.on and (event == "os.mkdir" or (event == "open" and arguments[2] & os.O_CREAT)):
            made.append(Path(os.fsdecode(arguments[0])))

    watch.on = True
    sys.addaudithook(watch)  # for good: hooks cannot be taken away
    (tmp_path / "out").mkdir()
    assert problems("m", "--save_state", "--save_every_n_epochs=1") == []
    watch.on = False
    assert {path.name for path in made} >= {"m.safetensors", "m-state", "m-000001.safetensors"}
    directly = [path.name for path in made if path.parent == tmp_path / "out"]
    assert directly
    assert all(name.startswith(".") and name.endswith(".tmp") for name in directly)


@pytest.mark.parametrize(
    ("flags", "option", "name", "why"),
    [
        (["--log_prefix=" + "p" * 250], "--log_prefix", "p" * 40, "File name too long"),
        (["--log_prefix=a\0b"], "--log_prefix", "a\0b" + "0" * 14, "embedded null"),
        (["--log_prefix=taken/x"], "--log_prefix", "taken/x" + "0" * 14, "logs/taken is no folder"),
        (["--logging_dir=" + "l" * 300], "--logging_dir", "l" * 40, "File name too long"),
        (["--logging_dir=logs/taken/x"], "--logging_dir", "logs/taken/x", "logs/taken is no folder"),
        (["--log_tracker_name=" + "t" * 300], "--log_tracker_name", "t" * 40, "File name too long"),
    ],
)
def test_logs_that_cannot_be_made(tmp_path, problems, monkeypatch, flags, option, name, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "taken").write_text("mine")
    before = everything(tmp_path)
    (line,) = problems("m", "--logging_dir=logs", *flags)
    assert line.startswith(f"{option}: ")
    assert name in line
    assert why in line
    assert everything(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_prefix_without_tensorboard_is_not_tried(tmp_path, problems):
    assert problems("m", f"--log_prefix={'p' * 300}") == []


def test_logs_in_a_folder_that_takes_none(tmp_path, problems):
    (tmp_path / "logs").mkdir(mode=0o555)
    folder = tmp_path / "logs" / ("v1_" + "0" * 14 + "-m")
    flags = (f"--logging_dir={tmp_path / 'logs'}", "--log_prefix=v1_")
    assert without_rights(lambda: problems("m", *flags)) == [
        f"--log_prefix: {folder} cannot be made (Permission denied); choose another name"
    ]


def test_logs_that_can_be_made_leave_no_trace(tmp_path, problems):
    flags = (f"--logging_dir={tmp_path / 'a' / 'logs'}", "--log_prefix=x/" + "p" * 241, "--log_tracker_name=my/style")
    assert problems("m", *flags) == []
    assert list(tmp_path.iterdir()) == []


def test_logs_are_tried_before_a_model_is_read(tmp_path, monkeypatch, capsys):
    """Through the beginning of a whole script."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "1_x").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "data" / "1_x" / "a.png")
    names = ("model.diffusion_model.input_blocks.0.0", "cond_stage_model.transformer.x", "first_stage_model.decoder.x")
    tensors = {f"{name}.weight": np.zeros((4, 4, 3, 3), np.float16) for name in names}
    save_file(tensors, "names_only.safetensors")  # loading it would fail
    flags = "--pretrained_model_name_or_path=names_only.safetensors --network_module=networks.lora --output_dir=out"
    flags += " --train_data_dir=data --resolution=64 --logging_dir=logs"
    with pytest.raises(SystemExit) as end:
        cli.run("sd", "network", [*flags.split(), f"--log_prefix={'p' * 250}"])
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: --log_prefix: logs/pppp")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "logs").exists()
