"""What killed runs have left is found at the next start of the same output."""

from __future__ import annotations

import pytest

from library.options.saving import SavingOptions
from library.runtime.durable import backup_of, replacing
from library.runtime.logs import LOGGER
from library.training import leftovers, state_notes
from library.training.plan import Progress


@pytest.fixture
def messages(caplog):
    LOGGER.propagate = True
    return lambda: [record.getMessage() for record in caplog.records]


def state(folder, text="1"):
    folder.mkdir(parents=True)
    for name in (state_notes.MODEL, state_notes.OPTIMIZER, state_notes.SCHEDULE):
        (folder / name).write_text(text)
    state_notes.write_notes(folder, Progress(1, 1), 0)
    return folder


def clear(folder, name="m"):
    leftovers.clear(SavingOptions(output_dir=str(folder), output_name=name))


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["m", None, "a/b", "v1.5 cat [x]", "猫" * 60])
def test_half_files_and_states_of_this_output_are_named_and_removed(tmp_path, messages, name):
    folder = (tmp_path / name).parent if name else tmp_path
    folder.mkdir(exist_ok=True)
    stem = (tmp_path / name).name if name else "last"
    ours = (
        [f"{stem}.safetensors", f"{stem}-000003.safetensors"] if name else ["epoch-000001.ckpt", "at-step00000002.pt"]
    )
    for target in ours:
        (folder / f".{target}.abcd1234.tmp").write_text("half")
    (folder / f".{stem}-state.abcd_234.tmp" / "new").mkdir(parents=True)
    (folder / f".{stem}-state.abcd_234.tmp" / "new" / "model.safetensors").write_text("half")
    others = [".other.safetensors.abcd1234.tmp", f".{stem}.safetensors.tmp", ".mx.safetensors.abcd1234.tmp"]
    for other in others:
        (folder / other).write_text("mine")
    clear(tmp_path, name)
    assert names(folder) == sorted(others)
    assert len(messages()) == 3
    assert all(line.startswith("removed ") and "which a killed run had left" in line for line in messages())


def test_what_is_being_written_stays(tmp_path, messages):
    with replacing(tmp_path / "m.safetensors") as temporary:
        clear(tmp_path)
        assert temporary.exists()
    assert messages() == []


@pytest.mark.parametrize("there", [False, True])
def test_a_whole_state_without_a_name_gets_it_if_nobody_has_it(tmp_path, messages, there):
    state(tmp_path / ".m-step00000004-state.abcd1234.tmp" / "new")
    target = tmp_path / "m-step00000004-state"
    if there:
        state(target, "earlier")
    clear(tmp_path)
    assert (target / state_notes.MODEL).read_text() == ("earlier" if there else "1")
    assert state_notes.is_whole(target)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    (line,) = messages()
    assert line.startswith("removed" if there else f"{target} was complete and has been renamed")


def test_a_state_with_a_wrong_checksum_is_not_restored(tmp_path):
    half = state(tmp_path / ".m-state.abcd1234.tmp" / "new")
    (half / state_notes.OPTIMIZER).write_text("")
    clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_earlier_state_that_an_earlier_version_moved_away_is_restored(tmp_path):
    """Killed between its two renames: nothing had the name, and both lay in the hidden folder."""
    state(tmp_path / ".m-state.abcd1234.tmp" / "old", "earlier")
    state(tmp_path / ".m-state.abcd1234.tmp" / "new", "later")
    clear(tmp_path)
    assert (tmp_path / "m-state" / state_notes.MODEL).read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["m-state"]


@pytest.mark.parametrize("there", [False, True])
def test_a_state_that_was_being_replaced_has_its_name_back(tmp_path, messages, there):
    target = tmp_path / "m-state"
    state(backup_of(target), "earlier")
    if there:
        state(target, "later")
    clear(tmp_path)
    assert (target / state_notes.MODEL).read_text() == ("later" if there else "earlier")
    assert [path.name for path in tmp_path.iterdir()] == ["m-state"]
    assert len(messages()) == (not there)


def test_half_sample_images_are_removed(tmp_path):
    (tmp_path / "sample").mkdir()
    for name in (".m_000001_00_2026.png.abcd1234.tmp", ".other_1.png.abcd1234.tmp", "m_000001_00_2026.png"):
        (tmp_path / "sample" / name).write_text("")
    clear(tmp_path)
    assert names(tmp_path) == ["sample/.other_1.png.abcd1234.tmp", "sample/m_000001_00_2026.png"]


def test_a_folder_that_is_not_there_yet_is_nothing(tmp_path):
    clear(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
