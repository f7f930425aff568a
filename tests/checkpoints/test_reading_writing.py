"""Weight files: same bytes as the safetensors library, no code run from a pickle, no file lost by a failure."""

from __future__ import annotations

import errno
import os
import pickle
import pickletools
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.checkpoints.reading import open_weights, read_header, read_state_dict
from library.checkpoints.writing import Deferred, write_safetensors, write_torch
from library.errors import UserError
from library.runtime.durable import replacing, replacing_folder


def tensors() -> dict[str, torch.Tensor]:
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float64]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.int16, torch.int8]
    made = {f"{'zyx'[n % 3]}{n}": torch.arange(6).reshape(2, 3).to(dtype) for n, dtype in enumerate(dtypes)}
    return made | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "é": torch.ones(3).half()}


@pytest.mark.parametrize("metadata", [None, {"one": "1"}])
def test_bytes_equal_the_safetensors_library(tmp_path, metadata):
    """One metadata key, because the library itself writes several in any order."""
    save_file(tensors(), tmp_path / "theirs.safetensors", metadata)
    write_safetensors(tmp_path / "ours.safetensors", tensors(), metadata)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_header_and_tensors_are_read_back(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", tensors(), {"k": "v"})
    metadata, header = read_header(tmp_path / "a.safetensors")
    assert metadata == {"k": "v"}
    assert header["scalar"] == ("F32", ())
    assert header["é"] == ("F16", (3,))
    read = read_state_dict(tmp_path / "a.safetensors")
    theirs = load_file(tmp_path / "a.safetensors")
    assert set(read) == set(theirs)
    weights = open_weights(tmp_path / "a.safetensors")
    for key, value in theirs.items():
        assert read[key].dtype == value.dtype == weights.dtype(key)
        assert torch.equal(
            read[key].view(torch.uint8) if value.ndim else read[key], value.view(torch.uint8) if value.ndim else value
        )


def test_tensors_stay_when_their_file_is_overwritten(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.ones(1000)})
    read = read_state_dict(path)
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) - 4000)
        file.write(bytes(4000))
    assert read["a"].sum() == 1000


def test_deferred_tensors_are_made_one_at_a_time(tmp_path):
    alive: list[str] = []

    def make(name: str):
        def inner() -> torch.Tensor:
            alive.append(name)
            return torch.full((2,), len(alive), dtype=torch.float16)

        return Deferred(torch.float16, (2,), inner)

    write_safetensors(tmp_path / "a.safetensors", {"b": make("b"), "a": make("a")})
    assert alive == ["a", "b"]
    assert load_file(tmp_path / "a.safetensors")["b"].tolist() == [2, 2]


def test_reading_headers_needs_no_torch(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    code = (
        "import sys; from library.checkpoints.reading import read_header; import library.families.sd.variants;"
        "print(read_header(sys.argv[1])[1]); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert "('F32', (1,))" in done.stdout


@pytest.mark.parametrize("kind", ["short", "text", "truncated", "missing", "folder"])
def test_broken_safetensors_are_named(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.ones(100)})
    whole = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"short": b"abc", "text": b"<html>" * 100, "truncated": whole[:-50]}[kind])
    with pytest.raises(UserError, match=r"model\.safetensors: "):
        read_state_dict(path)


class Malicious:
    def __reduce__(self):
        return os.mkdir, (str(Malicious.target),)

    target = Path()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path, legacy):
    Malicious.target = tmp_path / "owned"
    path = tmp_path / "bad.ckpt"
    content = {"state_dict": {"a": torch.ones(1)}, "callbacks": Malicious()}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"bad\.ckpt: refused, because .* would run code"):
        read_state_dict(path)
    assert not Malicious.target.exists()
    pickle.loads(pickle.dumps(Malicious()))  # it would have
    assert Malicious.target.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_ckpt_with_and_without_wrapper(tmp_path, legacy):
    state = {"a": torch.arange(3.0).half()}
    torch.save(state, tmp_path / "bare.pt", _use_new_zipfile_serialization=not legacy)
    write_torch(tmp_path / "wrapped.ckpt", {"state_dict": state, "epoch": 3, "global_step": 70})
    for name in ("bare.pt", "wrapped.ckpt"):
        read = read_state_dict(tmp_path / name)
        assert list(read) == ["a"]
        assert torch.equal(read["a"], state["a"])
    assert open_weights(tmp_path / "wrapped.ckpt").extra == {"epoch": 3, "global_step": 70}


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04 broken zip"])
def test_damaged_ckpt_is_named(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.ckpt: cannot be read"):
        read_state_dict(tmp_path / "a.ckpt")


def test_ckpt_without_weights(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="holds no weights"):
        read_state_dict(tmp_path / "a.ckpt")


def test_a_failed_write_leaves_the_earlier_file_and_no_rubbish(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.ones(1)})
    before = path.read_bytes()

    def fail() -> torch.Tensor:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_safetensors(path, {"a": Deferred(torch.float32, (1,), fail)})
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        write_torch(path, {"a": lambda: 0})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("sign", ["a", "é", "長", "😀"])
def test_names_as_long_as_file_systems_take_them(tmp_path, sign):
    signs = 60 if os.name == "nt" else (255 - len(".txt")) // len(sign.encode())  # whole paths are short on Windows
    path = tmp_path / f"{sign * signs}.txt"
    with replacing(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_the_earlier_folder(tmp_path):
    path = tmp_path / "model"
    with replacing_folder(path) as folder:
        (folder / "one").write_text("1")

    def fail() -> None:
        with replacing_folder(path) as folder:
            (folder / "two").write_text("2")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        fail()
    assert os.listdir(tmp_path) == ["model"]
    assert os.listdir(path) == ["one"]
    with replacing_folder(path) as folder:
        (folder / "three").write_text("3")
    assert os.listdir(path) == ["three"]


def test_new_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    with replacing(tmp_path / "ours") as temporary:
        temporary.write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def everything() -> dict:
    """What files of weights and states hold, with storages that are shared, empty and of every kind."""
    whole = torch.arange(6.0).reshape(2, 3)
    return {
        "whole": whole,
        "part": whole[1:],
        "half": torch.ones(3).half(),
        "bfloat16": torch.ones(5).bfloat16(),
        "fp8": torch.ones(2).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
        "none": torch.zeros(0),
        "parameter": nn.Parameter(torch.ones(2)),
        3: [{"a": torch.ones(1)}, ("b", None, 1.5)],
    }


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_reads_our_torch_files(tmp_path, mapped):
    write_torch(tmp_path / "a.pt", everything())
    read = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mapped)
    for name, value in everything().items():
        if isinstance(value, torch.Tensor):
            assert read[name].dtype == value.dtype
            assert torch.equal(read[name].float(), value.float())
        else:
            assert read[name] == value
    assert read["part"].untyped_storage().data_ptr() == read["whole"].untyped_storage().data_ptr()
    assert isinstance(read["parameter"], nn.Parameter)
    write_torch(tmp_path / "b.pt", everything())
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_torch_files_pass_the_check_of_the_web_ui(tmp_path):
    """AUTOMATIC1111's refuses other entries of the archive, of which newer torch writes several, and other names."""
    weights = {key: value for key, value in everything().items() if key not in ("fp8", "flags")}
    write_torch(tmp_path / "a.pt", weights)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
        assert all(re.fullmatch(r"[^/]+/(data/\d+|version|data\.pkl)", name) for name in archive.namelist())
        operations = pickletools.genops(archive.read("archive/data.pkl"))
        named = {argument for operation, argument, _ in operations if operation.name == "GLOBAL"}
    storages = {f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Long")}
    rebuilding = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"}
    assert named == storages | rebuilding


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_torch_file_on_a_full_disk_says_what_the_system_says(tmp_path):
    import resource

    path = tmp_path / "a.pt"
    write_torch(path, {"a": torch.ones(3)})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_torch(path, {"a": torch.ones(1 << 18), "b": torch.ones(1 << 18)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["a.pt"]
