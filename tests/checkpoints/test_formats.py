"""Weight files are known by their content: no name, right or wrong, changes what they are."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.checkpoints.formats import weight_format
from library.checkpoints.reading import (
    file_format,
    open_weights,
    read_metadata,
    read_names,
    read_state_dict,
    require_weights,
)
from library.checkpoints.writing import write_safetensors
from library.errors import UserError

NAMES = ("0a1b2c3d", "x.ckpt", "x.safetensors", "x.pt", "x.SafeTensors", "x.bin", "x.gguf")


def state() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).half(), "n": torch.tensor(3)}


def saved(path: Path, kind: str) -> Path:
    if kind == "safetensors":
        write_safetensors(path, state(), {"k": "v"})
    else:
        content = {"state_dict": state(), "global_step": 7} if "wrapped" in kind else state()
        with open(path, "wb") as file:
            torch.save(content, file, _use_new_zipfile_serialization="old" not in kind)
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["safetensors", "zip", "zip wrapped", "old", "old wrapped"])
def test_any_name_reads_the_same(tmp_path, name, kind):
    path = saved(tmp_path / name, kind)
    require_weights(path)
    assert file_format(path) == ("safetensors" if kind == "safetensors" else "torch")
    assert read_metadata(path) == ({"k": "v"} if kind == "safetensors" else {})
    assert read_names(path) == {"a.weight": ("F32", (2, 3)), "b": ("F16", (2,)), "n": ("I64", ())}
    for read in (read_state_dict(path), dict(open_weights(path).items())):
        assert read.keys() == state().keys()
        assert all(torch.equal(read[key], value) for key, value in state().items())


def test_a_header_as_long_as_a_pickle_begins(tmp_path):
    """640 is 80 02 in a file, like the second protocol of pickle."""
    path = tmp_path / "a"
    write_safetensors(path, {"a": torch.ones(1)})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = path.read_bytes()[8 : 8 + length].ljust(0x280)
    path.write_bytes((0x280).to_bytes(8, "little") + header + path.read_bytes()[8 + length :])
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert weight_format(path) == "safetensors"
    assert load_file(path)["a"] == read_state_dict(path)["a"] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.gguf", b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF is not supported"),
        ("model.safetensors", b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF is not supported"),
        ("model.ckpt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        ("model.safetensors", b"\n<!DOCTYPE html><html>", "this is a web page"),
        ("model_index.json", json.dumps({"_class_name": "X"}).encode(), "index of a Diffusers model; give its folder"),
        ("x.safetensors.index.json", b'{"weight_map": {}}', "give the Diffusers folder of the model"),
        ("config.json", b"{}", "this is a JSON file, not a weight file"),
        (
            "model.safetensors",
            b"",
            r"nor a torch checkpoint \(0 bytes\); get the file again",
        ),
        ("model.ckpt", b"no such thing", "neither a safetensors file nor a torch checkpoint"),
    ],
)
def test_what_is_no_weight_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    for read in (require_weights, read_state_dict, open_weights, read_names, read_metadata):
        with pytest.raises(UserError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_names_need_no_torch(tmp_path):
    saved(tmp_path / "a", "zip wrapped")
    code = (
        "import sys; from library.checkpoints.reading import read_names;"
        "print(read_names(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert "'a.weight': ('F32', (2, 3))" in done.stdout


@pytest.mark.parametrize("content", [b"PK\x03\x04 broken", b"\x80\x02 broken", pickle.dumps([1, 2], 2)])
def test_of_a_damaged_torch_file_no_names_are_known(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    assert read_names(tmp_path / "a.ckpt") is None
    with pytest.raises(UserError, match=r"a\.ckpt: cannot be read as a torch checkpoint"):
        read_state_dict(tmp_path / "a.ckpt")


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("folder/readme.txt", "no weights")
    with pytest.raises(UserError, match=r"a\.ckpt: cannot be read as a torch checkpoint"):
        read_state_dict(tmp_path / "a.ckpt")
