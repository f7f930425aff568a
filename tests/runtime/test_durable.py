"""Names are given when all is whole and flushed, and what dead writers leave is found."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library.runtime import durable
from library.runtime.durable import (
    abandoned,
    discard_abandoned,
    fitting,
    new_folder,
    recover,
    replacing,
    replacing_folder,
)


@pytest.fixture
def calls(monkeypatch):
    """What the system was asked for, in order: ("fsync", file name), ("rename", new name)."""
    seen = []
    fsync, replace, rename, exchange = os.fsync, os.replace, os.rename, durable._exchange

    def note_fsync(handle):
        seen.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def noting(kind, call):
        def note(source, target):
            seen.append((kind, Path(target).name))
            return call(source, target)

        return note

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", noting("rename", replace))
    monkeypatch.setattr(os, "rename", noting("rename", rename))
    monkeypatch.setattr(durable, "_exchange", noting("exchange", exchange))
    return seen


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and renameat2")


@linux
def test_a_file_is_flushed_before_its_name_and_the_folder_after_it(tmp_path, calls):
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert calls == [("fsync", temporary.name), ("rename", "a.txt"), ("fsync", tmp_path.name)]


@linux
def test_new_folders_above_are_flushed_too(tmp_path, calls):
    with replacing(tmp_path / "x" / "y" / "a.txt") as temporary:
        temporary.write_text("whole")
    assert [name for kind, name in calls if kind == "fsync"] == [tmp_path.name, "x", temporary.name, "y"]


@linux
@pytest.mark.parametrize("there", [False, True])
def test_all_of_a_folder_is_flushed_before_it_has_its_name(tmp_path, calls, there):
    target = tmp_path / "state"
    if there:
        target.mkdir()
        (target / "old.bin").write_text("old")
    with replacing_folder(target) as folder:
        (folder / "part").mkdir()
        (folder / "a.bin").write_text("a")
        (folder / "part" / "b.bin").write_text("b")
    named = next(number for number, call in enumerate(calls) if call in (("rename", "state"), ("exchange", "state")))
    before = {name for kind, name in calls[:named] if kind == "fsync"}
    assert {"a.bin", "b.bin", "part", "new"} <= before
    assert ("fsync", tmp_path.name) in calls[named:]
    assert sorted(path.name for path in target.rglob("*")) == ["a.bin", "b.bin", "part"]
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@linux
def test_a_folder_is_replaced_without_a_moment_in_which_none_has_the_name(tmp_path, monkeypatch):
    """The folder is looked at before and after every call that changes names."""
    target, seen = tmp_path / "state", []
    with replacing_folder(target) as folder:
        (folder / "a").write_text("1")

    def looking(real):
        def look(*args, **kwargs):
            seen.append((target / "a").read_text())
            try:
                return real(*args, **kwargs)
            finally:
                seen.append((target / "a").read_text())

        return look

    for owner, name in ((os, "rename"), (os, "replace"), (durable, "_exchange"), (durable.shutil, "rmtree")):
        monkeypatch.setattr(owner, name, looking(getattr(owner, name)))
    with replacing_folder(target) as folder:
        (folder / "a").write_text("2")
    assert seen[0] == "1"
    assert seen[-1] == "2"


@pytest.mark.parametrize("dies", [False, True])
def test_without_exchange_the_earlier_folder_has_a_visible_name_and_gets_its_own_back(tmp_path, monkeypatch, dies):
    target = tmp_path / "state"
    monkeypatch.setattr(durable, "_exchange", lambda left, right: False)
    rename = os.rename

    def dying(source, to):
        if dies and Path(to) == target and Path(source).name == durable.FRESH and durable.backup_of(target).exists():
            raise KeyboardInterrupt  # as good as a kill: nothing is put back
        rename(source, to)

    for text in "12":
        monkeypatch.setattr(os, "rename", dying)
        try:
            with replacing_folder(target) as folder:
                (folder / "a").write_text(text)
        except KeyboardInterrupt:
            assert [path.name for path in tmp_path.iterdir()] == ["state.previous"]
    monkeypatch.setattr(os, "rename", rename)
    assert recover(target) is dies
    assert (target / "a").read_text() == ("1" if dies else "2")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_earlier_one(tmp_path, monkeypatch):
    target = tmp_path / "state"
    target.mkdir()
    (target / "a").write_text("1")

    def refuse(left, right):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(durable, "_exchange", refuse)
    with pytest.raises(PermissionError), replacing_folder(target) as folder:
        (folder / "a").write_text("2")
    assert (target / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_the_first_of_two_new_folders_stays(tmp_path):
    with new_folder(tmp_path / "kept") as first:
        (first / "a").write_text("1")
        with new_folder(tmp_path / "kept") as second:
            (second / "a").write_text("2")
    assert (tmp_path / "kept" / "a").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


HANGING = """
import sys, time
from library.runtime.durable import replacing, replacing_folder
with replacing(sys.argv[1] + "/model.safetensors") as file, replacing_folder(sys.argv[1] + "/m-state") as folder:
    (folder / "a").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="locks and signals of POSIX")
def test_what_a_living_writer_has_is_left_and_what_a_killed_one_had_is_found(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", HANGING, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert writer.stdout.readline() == b"writing\n"
        assert list(abandoned(tmp_path, lambda name: True)) == []
        assert discard_abandoned([tmp_path / "model.safetensors"]) == []
    finally:
        writer.kill()
        writer.wait()
    found = list(abandoned(tmp_path, lambda name: True))
    assert [one.target.name for one in found] == ["m-state", "model.safetensors"]
    assert list(abandoned(tmp_path, lambda name: name == "other")) == []
    assert len(discard_abandoned([tmp_path / "model.safetensors"])) == 1
    assert [path.name for path in tmp_path.iterdir()] == [found[0].path.name]


def test_where_there_are_no_locks_only_old_files_are_taken_for_abandoned(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "fcntl", None)
    for name, age in (("new", 0), ("old", 3 * 24 * 3600)):
        path = tmp_path / f".{name}.abcd_123.tmp"
        path.write_text("half")
        os.utime(path, (time.time() - age,) * 2)
    assert [one.target.name for one in abandoned(tmp_path, lambda name: True)] == ["old"]


def test_files_of_others_are_no_leftovers(tmp_path):
    for name in (".a.tmp", "a.abcd1234.tmp", ".a.ABCD1234.tmp", ".a.abcd1234.tmp.bak", ".a.abcd12345.tmp"):
        (tmp_path / name).write_text("mine")
    assert list(abandoned(tmp_path, lambda name: True)) == []


@pytest.mark.parametrize("letter", ["a", "ü", "猫", "🐱"])
def test_long_names_are_shortened_and_stay_apart(tmp_path, letter):
    names = {fitting(f"{letter * 250}{end}", "_000001_00.png") for end in "xyz"}
    assert len(names) == 3
    for name in names:
        assert len(os.fsencode(name)) <= 255
        assert name.startswith(letter * 50)
        assert name.endswith("_000001_00.png")
        with replacing(tmp_path / name) as temporary:
            temporary.write_text("fits")
    assert fitting("short", ".png") == "short.png"


def test_flushing_file_systems_takes_whatever_folders_there_are(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(durable, "_flush_file_system", flushed.append)
    durable.flush_file_systems([tmp_path, tmp_path.parent, tmp_path / "none"])
    assert flushed == [tmp_path]
