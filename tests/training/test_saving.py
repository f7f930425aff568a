import os
import signal
from pathlib import Path

import pytest

from library.errors import UserError
from library.runtime.durable import remove
from library.training.saving import SavePlan, failing_clearly


def plan(**changes) -> SavePlan:
    values = {
        "folder": Path("out"),
        "name": None,
        "suffix": ".safetensors",
        "every_epochs": None,
        "every_steps": None,
        "last_epochs": None,
        "last_steps": None,
    }
    return SavePlan(**{**values, **changes})


@pytest.mark.rows("R125", "R126")
def test_names():
    named = plan(name="style")
    assert named.epoch_path(3).name == "style-000003.safetensors"
    assert named.step_path(250).name == "style-step00000250.safetensors"
    assert named.final_path().name == "style.safetensors"
    bare = plan(suffix="")
    assert [p.name for p in (bare.epoch_path(1), bare.step_path(2), bare.final_path())] == [
        "epoch-000001",
        "at-step00000002",
        "last",
    ]
    assert [plan(suffix=suffix).final_path().name for suffix in (".safetensors", ".ckpt")] == [
        "last.safetensors",
        "last.ckpt",
    ]


@pytest.mark.rows("R140")
def test_every_n_epochs_leaves_the_last_epoch_to_the_final_model():
    saves = plan(every_epochs=2)
    assert [epoch for epoch in range(1, 9) if saves.after_epoch(epoch, 8)] == [2, 4, 6]


def test_retention_by_epochs():
    saves = plan(every_epochs=2, last_epochs=2)
    removed = {epoch: saves.after_epoch(epoch, 20)[1] for epoch in (2, 4, 6, 8)}
    assert removed[2] is None
    assert removed[4].name == "epoch-000000.safetensors"  # a file that was never written: nothing is deleted
    assert removed[6].name == "epoch-000002.safetensors"
    assert removed[8].name == "epoch-000004.safetensors"


def test_retention_by_steps_as_in_the_worked_example():
    """Every 10, last 30: at step 50 the file of step 10 goes."""
    saves = plan(every_steps=10, last_steps=30)
    assert saves.after_step(50)[1].name == "at-step00000010.safetensors"
    assert saves.after_step(55) is None
    assert saves.after_step(30)[1] is None


def test_only_the_exact_name_is_deleted(tmp_path):
    for name in ("epoch-000002.safetensors", "epoch-000002.safetensors.bak", "my-epoch-000002.safetensors"):
        (tmp_path / name).write_text("x")
    remove(tmp_path / "epoch-000002.safetensors")
    remove(tmp_path / "epoch-000002.safetensors")  # missing files are no mistake
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "epoch-000002.safetensors.bak",
        "my-epoch-000002.safetensors",
    ]


@pytest.mark.rows("R142")
def test_names_and_retention_of_states():
    bare = plan(suffix=".safetensors", every_epochs=1, last_epochs=2, states=True)
    due = bare.after_epoch(3, 9)
    assert (due.path.name, due.state.name) == ("epoch-000003.safetensors", "epoch-000003-state")
    assert (due.obsolete.name, due.obsolete_state.name) == ("epoch-000001.safetensors", "epoch-000001-state")
    named = plan(name="v1.5 cat", every_steps=10, last_steps=30, states=True, last_steps_state=10)
    due = named.after_step(50)
    assert due.state.name == "v1.5 cat-step00000050-state"
    assert (due.obsolete.name, due.obsolete_state.name) == (
        "v1.5 cat-step00000010.safetensors",
        "v1.5 cat-step00000030-state",
    )
    assert named.final().state.name == "v1.5 cat-state"
    assert plan(suffix="", name="folder", states=True).final().state.name == "folder-state"


def test_states_only_where_they_are_asked_for():
    assert plan(every_steps=1).after_step(1).state is None
    assert plan().final().state is None
    assert plan(final_state=True).final().state.name == "last-state"
    assert plan(every_steps=1, final_state=True).after_step(1).state is None


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
@pytest.mark.parametrize("package", ["python", "safetensors", "torch"])
def test_whoever_shows_of_a_full_disk_it_is_one_line(tmp_path, package):
    import resource

    import torch
    from safetensors.torch import save_file

    path, large = tmp_path / "m", {"a": torch.ones(1 << 18)}
    writers = {
        "python": lambda: path.write_bytes(bytes(1 << 20)),
        "safetensors": lambda: save_file(large, path),
        "torch": lambda: torch.save(large, path),
    }
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(UserError) as caught, failing_clearly(path):
            writers[package]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    (line,) = caught.value.problems
    assert line.startswith(f"{path}: cannot be saved (")
    assert line.endswith("); what was saved before is whole")


def test_a_mistake_of_our_own_is_not_taken_for_a_full_disk():
    with pytest.raises(RuntimeError, match="shapes"), failing_clearly(Path("m")):
        raise RuntimeError("shapes do not fit")
