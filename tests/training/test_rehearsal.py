"""What can only fail at the end of a run is refused at its beginning, and trying leaves nothing behind."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest

from library.options import validation
from library.options.parsing import parse_options
from library.registry import FAMILIES, groups_for
from library.training import rehearsal

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def problems(tmp_path):
    """What is said about an output name, after everything that the options alone tell."""

    def problems(name, *flags, method="network"):
        needed = [f"--output_dir={tmp_path / 'out'}", "--pretrained_model_name_or_path=m.safetensors", *flags]
        needed += [] if name is None else [f"--output_name={name}"]
        needed += ["--network_module=networks.lora"] if method == "network" else []
        opts = parse_options(groups_for("sd", method), [*needed, "--train_data_dir=d", "--resolution=64"])
        found = [line for line in validation.problems(opts, FAMILIES["sd"].traits) if line.startswith("--output")]
        return found or rehearsal.problems(opts)

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
