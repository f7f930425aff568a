"""Checkpoints with objects of other libraries are read, and nothing that a file names is ever imported or run."""

from __future__ import annotations

import builtins
import enum
import os
import pickle
import signal
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from library.checkpoints.reading import open_weights, read_names, read_state_dict, read_torch
from library.checkpoints.unpickling import (
    SafeUnpickler,
    StandIn,
    is_zip,
    load_tolerant,
    load_torch,
    read_specs,
)
from library.errors import UserError
from tests.builders.rights import without_rights

LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "old"])


def save(content: object, path: Path, legacy: bool) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.fixture
def framework(monkeypatch):
    """A library with callbacks that was there when the file was made, and is gone when it is read."""
    module = types.ModuleType("pytorch_lightning_of_old.callbacks")

    class ModelCheckpoint:
        def __init__(self):
            self.best, self.paths = torch.tensor(0.5), {"a": Path("x")}

        def __setstate__(self, state):
            raise AssertionError("code of the file's classes ran")

    class Mode(enum.Enum):
        MIN = "min"

    class Settings(dict):
        pass

    class Values(list):
        pass

    for kind in (ModelCheckpoint, Mode, Settings, Values):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "pytorch_lightning_of_old", types.ModuleType("pytorch_lightning_of_old"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@LEGACY
def test_objects_of_a_framework_become_nothing(tmp_path, framework, monkeypatch, caplog, legacy):
    state = OrderedDict(a=torch.arange(3.0).half(), b=nn.Parameter(torch.ones(2, 2)), c=torch.ones(4)[1:3])
    state._metadata = {"": {"version": 1}}
    content = {
        "state_dict": state,
        "callbacks": {framework.ModelCheckpoint: framework.ModelCheckpoint(), "mode": framework.Mode.MIN},
        "hyper_parameters": framework.Settings(lr=1e-4, more=framework.Values([1, {2, 3}, Path("y")])),
        "global_step": 470000,
    }
    path = save(content, tmp_path / "a.ckpt", legacy)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning_of_old")]:
        monkeypatch.delitem(sys.modules, name)
    assert read_names(path) == {"a": ("F16", (3,)), "b": ("F32", (2, 2)), "c": ("F32", (2,))}
    with caplog.at_level("INFO"):
        weights = open_weights(path)
    assert {key: value.tolist() for key, value in weights.items()} == {k: v.tolist() for k, v in state.items()}
    assert weights.extra == {"global_step": 470000}
    assert all(type(value) is torch.Tensor and not value.requires_grad for value in weights.values())
    assert "pytorch_lightning_of_old.callbacks.ModelCheckpoint" in caplog.text
    assert not any(name.startswith("pytorch_lightning_of_old") for name in sys.modules)


class Calls:
    """Pickles to a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def touch(path):
    return f"open({str(path)!r}, 'w').close()"


ATTACKS = {
    "os.system": lambda mark: Calls(os.system, f"touch {mark}"),
    "os.mkdir": lambda mark: Calls(os.mkdir, str(mark)),
    "eval": lambda mark: Calls(eval, touch(mark)),
    "exec": lambda mark: Calls(exec, touch(mark)),
    "open": lambda mark: Calls(builtins.open, str(mark), "w"),
    "nested": lambda mark: {"deep": [({"er": Calls(eval, touch(mark))},)]},
    "as a key": lambda mark: {Calls(eval, touch(mark)): 1},
    "argument": lambda mark: Calls(OrderedDict, [("a", Calls(eval, touch(mark)))]),
}


@LEGACY
@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_files_are_refused_and_run_nothing(tmp_path, attack, legacy):
    mark = tmp_path / "owned"
    content = {"state_dict": {"a": torch.ones(1)}, "x": ATTACKS[attack](mark)}
    path = save(content, tmp_path / "a.ckpt", legacy)
    read_names(path)
    with pytest.raises(UserError, match=r"a\.ckpt: refused, because .* would run code from the file"):
        read_state_dict(path)
    assert not mark.exists()


@LEGACY
@pytest.mark.parametrize(
    "make",
    [
        lambda mark: Calls(getattr, "a", "upper"),
        lambda mark: Calls(pickle.loads, pickle.dumps(Calls(eval, touch(mark)))),
        lambda mark: Calls(torch.load, str(mark)),
        lambda mark: Calls(torch.hub.load, "a/b", "c"),
        lambda mark: Calls(map, str, [1]),
        lambda mark: Calls(Path(mark).touch),  # a bound method: the result of a call is called
    ],
)
def test_functions_that_are_not_on_the_list_are_not_called_either(tmp_path, make, legacy):
    mark = tmp_path / "owned"
    content = {"state_dict": {"a": torch.ones(2)}, "x": make(mark)}
    path = save(content, tmp_path / "a.ckpt", legacy)
    assert read_state_dict(path)["a"].tolist() == [1, 1]
    assert not mark.exists()


def test_in_the_place_of_the_weights_it_is_no_weights(tmp_path):
    save({"state_dict": Calls(getattr, "a", "upper")}, tmp_path / "a.ckpt", False)
    with pytest.raises(UserError, match=r"a\.ckpt: holds no weights"):
        read_state_dict(tmp_path / "a.ckpt")


def test_torchscript_is_not_run(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "a.pt"))
    with pytest.raises(UserError, match=r"a\.pt: this is a TorchScript program"):
        read_state_dict(tmp_path / "a.pt")


KINDS = {"pipe": "a named pipe", "folder": "a folder", "link": "a device"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", [is_zip, read_specs, load_torch, load_tolerant, read_torch])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, reader, kind):
    """None of the readers waits for a pipe, or reads a device without end, whoever calls it."""
    path = tmp_path / kind
    {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda link: os.symlink("/dev/zero", link)}[kind](path)
    signal.alarm(20)
    try:
        with pytest.raises((UserError, OSError), match=KINDS[kind]) as caught:
            reader(path)
    finally:
        signal.alarm(0)
    assert str(path) in str(caught.value)


@LEGACY
def test_a_file_that_may_not_be_read_is_one_line(tmp_path, legacy):
    path = save({"a": torch.ones(1)}, tmp_path / "a.ckpt", legacy)
    path.chmod(0)
    for reader in (read_names, read_state_dict, read_torch):
        with pytest.raises(UserError) as caught:
            without_rights(lambda reader=reader: reader(path))
        assert str(caught.value) == f"{path}: no permission to read it"
    with pytest.raises(PermissionError):
        without_rights(lambda: read_specs(path))


def test_a_pickle_cannot_change_what_rebuilds(tmp_path):
    """BUILD with slots sets attributes, here of the class that stands for a function."""
    program = b"c" + b"torch.hub\nload\n" + b"(NS'__new__'\nS'x'\nstb."
    (tmp_path / "p").write_bytes(b"\x80\x02" + program.replace(b"(NS'__new__'\nS'x'\nst", b"N}S'__new__'\nS'x'\ns\x86"))
    with open(tmp_path / "p", "rb") as file, pytest.raises(TypeError):
        SafeUnpickler(file, {}).load()
    assert isinstance(StandIn(1, a=2), StandIn)
