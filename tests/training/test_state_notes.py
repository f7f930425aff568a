"""What train_state.json says is believed only as far as it can be true, and the files are those that were saved."""

from __future__ import annotations

import json

import pytest

from library.errors import UserError
from library.training import state_notes
from library.training.plan import Progress
from library.training.state_notes import MODEL, OPTIMIZER, PROGRESS, SCHEDULE
from tests.builders.rights import without_rights


@pytest.fixture
def folder(tmp_path):
    for name in (MODEL, OPTIMIZER, SCHEDULE):
        (tmp_path / name).write_bytes(name.encode())
    state_notes.write_notes(tmp_path, Progress(4, 2, epoch_ended=False), 7, {"optimizer": "torch.optim.AdamW"})
    return tmp_path


def change(folder, **values):
    file = folder / PROGRESS
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_what_was_written_is_read(folder):
    assert state_notes.read_progress(folder) == Progress(4, 2, epoch_ended=False)
    assert state_notes.read_seed(folder) == 7
    assert state_notes.read_settings(folder) == {"optimizer": "torch.optim.AdamW"}
    state_notes.verify(folder)
    assert state_notes.is_whole(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("current_step", value) for value in (-5, 1e999, "4", None, [4], True, 4.5, 10**40)),
        *(("current_epoch", value) for value in (0, -1, 999, "two", {}, float("nan"))),
        *(("seed", value) for value in ("text", [1], 10**40, -1, 1.5, True)),
        ("epoch_ended", "no"),
        ("made_with", [1]),
    ],
)
def test_impossible_values_are_one_line(folder, name, value):
    change(folder, **{name: value})
    others = {"made_with": state_notes.read_settings, "seed": state_notes.read_seed}
    read = others.get(name, state_notes.read_progress)
    with pytest.raises(UserError) as caught:
        read(folder)
    (line,) = caught.value.problems
    assert line.startswith(f"--resume: {folder / PROGRESS}: {name} cannot be ")
    assert len(line) < len(str(folder)) + 150


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", "\xff", "[" * 200_000, '{"files": 3}'])
def test_what_is_no_such_file_is_one_line(folder, text):
    (folder / PROGRESS).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"train_state\.json cannot be read; choose an earlier state"):
        state_notes.read_progress(folder)
    assert not state_notes.is_whole(folder)


def test_whole_numbers_may_be_written_with_a_point(folder):
    change(folder, current_step=4.0)
    assert state_notes.read_progress(folder).step == 4


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, SCHEDULE])
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "gone"])
def test_a_file_that_is_not_what_was_saved_is_named(folder, name, damage):
    content = bytearray((folder / name).read_bytes())
    content[2] ^= 1
    if damage == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes({"flipped": content, "cut": content[:3], "empty": b""}[damage])
    with pytest.raises(UserError, match=name):
        state_notes.verify(folder)
    assert not state_notes.is_whole(folder)


def test_states_without_checksums_are_not_doubted(folder):
    (folder / PROGRESS).write_text(json.dumps({"current_step": 4, "current_epoch": 1}))
    state_notes.verify(folder)
    assert not state_notes.is_whole(folder)  # nobody can tell
    (folder / PROGRESS).unlink()
    state_notes.verify(folder)


def test_checksums_do_not_lead_out_of_the_folder(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret"
    outside.write_text("x")
    change(folder, files={str(outside): {"bytes": 1, "sha256": "?"}})
    with pytest.raises(UserError, match="cannot be read"):
        state_notes.verify(folder)


def test_a_state_that_may_not_be_looked_at_is_no_missing_one(tmp_path):
    folder = tmp_path / "closed" / "m-state"
    folder.mkdir(parents=True)
    folder.chmod(0)
    with pytest.raises(UserError) as caught:
        without_rights(lambda: state_notes.read_progress(folder))
    assert str(caught.value) == f"--resume: {folder}: no permission to look into it"
    folder.parent.chmod(0)
    with pytest.raises(UserError) as caught:
        without_rights(lambda: state_notes.read_progress(folder))
    assert str(caught.value) == f"--resume: {folder}: it cannot be examined (Permission denied)"
