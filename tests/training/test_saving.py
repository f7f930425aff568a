import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from library.errors import UserError
from library.options.saving import SavingOptions
from library.runtime.durable import remove
from library.training.saving import SavePlan, check_space, failing_clearly, make_save_plan
from tests.builders.options import options_with


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
    assert (named.best_path(), plan().best_path().name) == (Path("out/style-best.safetensors"), "last-best.safetensors")
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
    assert plan(every_steps=10, last_steps=29).after_step(50)[1].name == "at-step00000020.safetensors"


def test_without_a_limit_all_copies_are_kept():
    assert plan(every_epochs=1).after_epoch(3, 9).obsolete is None
    assert plan(every_steps=1).after_step(3).obsolete is None


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


# ---- from the options of a run


def made(epochs=10, **given) -> SavePlan:
    return make_save_plan(options_with(SavingOptions, **given).saving, ".safetensors", epochs)


def test_a_plan_follows_the_options():
    given = {"output_dir": "here", "output_name": "cat", "save_every_n_epochs": 2, "save_last_n_epochs": 3}
    epochs = made(**given, save_last_n_epochs_state=1, save_state=True)
    assert epochs.after_epoch(8, 10) == (
        Path("here/cat-000008.safetensors"),
        Path("here/cat-000002.safetensors"),
        Path("here/cat-000008-state"),
        Path("here/cat-000006-state"),
    )
    assert epochs.after_step(8) is None
    steps = made(
        output_dir="here", save_every_n_steps=5, save_last_n_steps=10, save_last_n_steps_state=5, save_state=True
    )
    assert [path.name for path in steps.after_step(30)] == [
        "at-step00000030.safetensors",
        "at-step00000015.safetensors",
        "at-step00000030-state",
        "at-step00000020-state",
    ]
    assert made(output_dir="here", save_state_on_train_end=True).final().state == Path("here/last-state")


@pytest.mark.parametrize(("epochs", "ratio", "saved"), [(10, 3, [3, 6, 9]), (9, 3, [3, 6]), (3, 5, [1, 2])])
def test_a_number_of_copies_in_all(epochs, ratio, saved):
    plan = made(epochs, output_dir="out", save_n_epoch_ratio=ratio)
    assert [epoch for epoch in range(1, epochs + 1) if plan.after_epoch(epoch, epochs)] == saved


def test_room_is_looked_for_where_the_folder_will_be(tmp_path):
    folder = tmp_path / "not" / "there yet"
    check_space(folder, 1, "a copy")
    with pytest.raises(UserError) as caught:
        check_space(folder, 1 << 60, "a copy")
    shown = re.fullmatch(r"(.*): a copy takes about (\d+) MiB, and only (\d+) MiB are free; .*", str(caught.value))
    assert (shown[1], int(shown[2])) == (str(folder), 1 << 40)
    assert int(shown[3]) == pytest.approx(shutil.disk_usage(tmp_path).free / 2**20, rel=0.2)  # others write beside us


@pytest.mark.parametrize(("error", "reason"), [(OSError("no room\nat all"), "no room"), (OSError(), "OSError")])
def test_an_error_without_a_number_is_told_in_one_line(error, reason):
    with pytest.raises(UserError, match=rf"m: cannot be saved \({reason}\);"), failing_clearly(Path("m")):
        raise error
