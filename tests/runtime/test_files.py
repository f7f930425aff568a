"""Only regular files are opened, and no more is read than the reader takes."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from library.runtime.files import open_regular, path_problem, read_bytes, reason


@pytest.fixture(autouse=True)
def _no_waiting():
    """A reader that waits for a pipe's other end must not hold up the whole suite."""
    signal.alarm(20)
    yield
    signal.alarm(0)


@pytest.fixture
def odd(tmp_path):
    """What looks like a file to `open` and is none, by what messages call it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # a socket's path may have about 100 characters only
        server.bind("socket")
        yield {
            "a named pipe": tmp_path / "pipe",
            "a folder": tmp_path / "folder",
            "a device": tmp_path / "link",
            "a socket": tmp_path / "socket",
        }


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", ["a named pipe", "a folder", "a device", "a socket"])
def test_what_is_no_regular_file_is_refused_at_once(odd, kind):
    with pytest.raises(OSError, match=kind) as caught:
        read_bytes(odd[kind])
    assert reason(caught.value).startswith(kind)
    assert caught.value.filename == str(odd[kind])
    assert kind in path_problem(odd[kind], "file")


def test_a_regular_file_is_read_also_by_a_link(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to("a")
    assert read_bytes(tmp_path / "b") == b"abc"
    with open_regular(tmp_path / "b") as file:
        assert file.read(2) == b"ab"
    assert path_problem(tmp_path / "b", "file") is None


@pytest.mark.parametrize(("limit", "fits"), [(2, False), (3, True), (4, True)])
def test_a_file_above_the_limit_is_not_read(tmp_path, limit, fits):
    (tmp_path / "a").write_bytes(b"abc")
    if fits:
        assert read_bytes(tmp_path / "a", limit) == b"abc"
        return
    with pytest.raises(OSError, match="at most 2 are read"):
        read_bytes(tmp_path / "a", limit)


def test_a_huge_file_costs_nothing(tmp_path):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="1,099,511,627,776 bytes"):
        read_bytes(tmp_path / "sparse", 1 << 20)


@pytest.mark.parametrize(
    ("name", "kind", "problem"),
    [
        ("none", "file", "no such file"),
        ("none", "folder", "no such folder"),
        ("a/b", "file", "no such file"),
        ("dangling", "file", "a link that leads nowhere"),
        ("a", "folder", "a file, not a folder"),
        ("x" * 5000, "file", "it cannot be examined (File name too long)"),
        ("n\0ul", "folder", "no name that a file can have (a NUL character)"),
        (".", "folder", None),
        (".", "file", "a folder, not a file"),
    ],
)
def test_a_path_says_what_is_wrong_with_it(tmp_path, name, kind, problem):
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert path_problem(name, kind) == problem


def test_a_nul_in_a_path_is_an_os_error():
    with pytest.raises(OSError, match="null"):
        open_regular("a\0b")
