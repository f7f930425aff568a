"""The .npz store: numpy's own format, no damage passes for data, and no failure costs the old file."""

from __future__ import annotations

import errno
import io
import json
import os
import tracemalloc
import zipfile

import numpy as np
import pytest

from library.caching import store
from library.caching.store import CacheDamaged

ARRAYS = {
    "latents": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "half": np.linspace(-1, 1, 6, dtype=np.float16).reshape(2, 3),
    "original_size": np.array([640, 480], np.int64),
    "flag": np.array(True),
    "empty": np.zeros((0, 4)),
}


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and left[name].tobytes() == right[name].tobytes()
        for name in left
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.npz"
    store.write(path, ARRAYS)
    return path


@pytest.fixture
def no_leftovers(tmp_path):
    yield
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_numpy_reads_what_we_write_and_we_read_what_numpy_writes(file, tmp_path):
    with np.load(file, allow_pickle=False) as theirs:
        assert same(dict(theirs), ARRAYS)
    assert zipfile.ZipFile(file).testzip() is None
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "theirs.npz", **ARRAYS)
        assert same(store.read(tmp_path / "theirs.npz"), ARRAYS)


def test_arrays_of_any_memory_layout(tmp_path):
    base = np.arange(24.0).reshape(4, 6)
    arrays = {"turned": base.T, "every other": base[:, ::2], "big end first": base.astype(">f8")}
    store.write(tmp_path / "a.npz", arrays)
    np.savez(tmp_path / "b.npz", **arrays)
    for name in ("a.npz", "b.npz"):
        read = store.read(tmp_path / name)
        assert all(np.array_equal(read[key], arrays[key]) and read[key].flags.writeable for key in arrays)


def test_only_what_is_asked_is_read(file):
    assert list(store.read(file, ["flag", "half"])) == ["flag", "half"]
    assert store.names(file) == sorted(ARRAYS)
    with pytest.raises(CacheDamaged, match="no array other"):
        store.read(file, ["flag", "other"])
    content = file.read_bytes().replace(ARRAYS["latents"].tobytes(), bytes(96))
    file.write_bytes(content)
    assert store.read(file, ["half"])["half"].shape == (2, 3)
    with pytest.raises(CacheDamaged, match="CRC"):
        store.read(file, ["latents"])


def test_equal_arrays_make_equal_files(file, tmp_path):
    other = tmp_path / "b.npz"
    names = list(ARRAYS)
    store.write(other, {name: ARRAYS[name] for name in reversed(names)})
    assert other.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_no_wrong_byte_passes_for_data(tmp_path, flip):
    """Every byte of a file in turn. Some are mere book-keeping (times, versions); none may change what is read."""
    arrays = {"latents": ARRAYS["latents"], "size": ARRAYS["original_size"]}
    path = tmp_path / "a.npz"
    store.write(path, arrays)
    whole = path.read_bytes()
    data = set()
    for array in arrays.values():
        at = whole.index(array.tobytes())
        data |= set(range(at, at + array.nbytes))
    detected = set()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        try:
            assert same(store.read(path), arrays), at
        except CacheDamaged:
            detected.add(at)
    assert len(data & detected) == len(data) == 96 + 16
    assert len(detected) > len(whole) * 3 / 4  # headers of arrays have checksums too; what is left is the zip's own


def test_a_file_that_is_cut_off_anywhere(tmp_path):
    path = tmp_path / "a.npz"
    store.write(path, {"size": ARRAYS["original_size"]})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CacheDamaged):
            store.read(path)


def content_of(*members) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def npy(header: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header.encode() + data


FLOATS = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"some text", "no .npz file"),
        (bytes(5000), "no .npz file"),
        (content_of(), "nothing in it"),
        (content_of(("a.npy", npy(FLOATS, bytes(24))))[:60], "cut off"),
        (content_of(("readme.txt", b"hello")), "readme.txt in it is no array"),
        (content_of(("a.npy", b"hello")), "a in it does not begin like an array"),
        (content_of(("a.npy", b"")), "begin like an array"),
        (content_of(("a.npy", npy("{'descr': '<f4'}\n"))), "begin like an array"),
        (content_of(("a.npy", npy("{'descr': '<f4', (\n"))), "begin like an array"),
        (content_of(("a.npy", npy("__import__('os').abort()\n"))), "begin like an array"),
        (content_of(("a.npy", npy(FLOATS, bytes(23)))), "not the size"),
        (content_of(("a.npy", npy(FLOATS, bytes(28)))), "not the size"),
        (content_of(("a.npy", npy(FLOATS.replace("2", str(2**60)), bytes(24)))), "not the size"),
        (content_of(("a.npy", npy(FLOATS.replace("2, 3", "-2, -3"), bytes(24)))), "negative"),
        (content_of(("a.npy", npy(FLOATS, bytes(24), b"\7\0"))), "begin like an array"),
    ],
)
def test_damage_has_a_reason(tmp_path, content, reason):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(CacheDamaged, match=reason) as caught:
        store.read(path)
    assert "a.npz" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert store.summary(path) == {"damaged": str(caught.value)}


def test_objects_are_refused_without_being_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / "a.npz"
    np.savez(path, a=np.array([Trap()], dtype=object), b=np.ones(2))
    with pytest.raises(CacheDamaged, match="a in it holds Python objects"):
        store.read(path)
    assert "damaged" in store.summary(path)
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(ValueError, match=r"[Oo]bject"):
        store.write(path, {"a": np.array([Trap()], dtype=object)})
    with np.load(path, allow_pickle=True) as archive:  # the trap would have worked, and the old file is still there
        archive["a"]
    assert (tmp_path / "sprung").exists()


def test_a_missing_file_is_not_a_damaged_one(tmp_path):
    for read in (store.read, store.names):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none.npz")
    assert store.summary(tmp_path / "none.npz")["damaged"]
    store.write(tmp_path / "new folder" / "a.npz", ARRAYS)
    assert same(store.read(tmp_path / "new folder" / "a.npz"), ARRAYS)


@pytest.mark.usefixtures("no_leftovers")
def test_a_full_disk_leaves_the_old_file(file):
    """The system itself refuses to write more than so many bytes, as a full disk does."""
    resource = pytest.importorskip("resource", reason="limits of file sizes are Unix's")
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(OSError, match=r"[Ll]arge") as caught:
            store.write(file, {"more": np.ones(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert file.read_bytes() == before


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("function", ["replace"])
def test_a_failure_at_the_last_moment_leaves_the_old_file(file, monkeypatch, function):
    before = file.read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space"):
        store.write(file, {"more": np.ones(1000)})
    monkeypatch.undo()
    assert file.read_bytes() == before


def test_the_summary_is_json_and_shows_all(tmp_path):
    note = {"made_of": "ü", "number": 1.5, "none": None, "list": [1, 2]}
    arrays = ARRAYS | {
        "provenance": store.pack_note(note),
        "provenance_2x3": store.pack_note({}),
        "nan": np.array([[1, np.nan] * 5]),
        "inf": np.array([np.inf], np.float16),
        "text": np.array("words"),
    }
    store.write(tmp_path / "a.npz", arrays)
    summary = store.summary(tmp_path / "a.npz")
    assert json.loads(json.dumps(summary)) == summary
    assert summary["provenance"] == {"": note, "_2x3": {}}
    assert summary["arrays"] == {
        "latents": [[2, 3, 4], "float32"],
        "half": [[2, 3], "float16"],
        "original_size": [[2], "int64"],
        "flag": [[], "bool"],
        "empty": [[0, 4], "float64"],
        "nan": [[1, 10], "float64"],
        "inf": [[1], "float16"],
        "text": [[], "<U5"],
    }
    assert summary["not_finite"] == ["inf", "nan"]
    values = {name: summary["values"][name] for name in ("original_size", "flag", "empty", "inf")}
    assert values == {"original_size": [640, 480], "flag": True, "empty": [], "inf": [np.inf]}
    assert summary["values"].keys() == values.keys() | {"half"}


@pytest.mark.parametrize("array", [np.ones(3), np.frombuffer(b"{", np.uint8), np.frombuffer(b"[1]", np.uint8)])
def test_what_is_no_note(tmp_path, array):
    with pytest.raises(CacheDamaged, match="note"):
        store.unpack_note(array)
    store.write(tmp_path / "a.npz", {"provenance": array})
    assert "note" in store.summary(tmp_path / "a.npz")["damaged"]


@pytest.fixture
def bomb(tmp_path):
    """A file of some kilobytes whose one array says, truly, that it is larger than any cache."""
    header = io.BytesIO()
    shape = (store.LARGEST_ARRAY // 4 + 1,)
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
        archive.open("latents.npy", "w", force_zip64=True) as member,
    ):
        member.write(header.getvalue())
        block = bytes(1 << 20)
        for _ in range(store.LARGEST_ARRAY // len(block)):
            member.write(block)
        member.write(bytes(4))
    return tmp_path / "a.npz"


def peak_of(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_would_unpack_to_gigabytes_is_not_unpacked(bomb):
    assert bomb.stat().st_size < 1 << 20
    found = {}
    assert peak_of(lambda: found.update(store.summary(bomb))) < 1 << 24
    assert found["damaged"].startswith("its arrays take 268,4")
    for read in (store.read, store.names):
        with pytest.raises(CacheDamaged, match="more than any cache does"):
            read(bomb)


def test_an_array_that_is_larger_than_wanted_is_not_unpacked(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", latents=np.zeros((4, 1024, 1024), np.float32))
    assert store.read(tmp_path / "a.npz", ["latents"], {"latents": (4, 1024, 1024)})["latents"].shape[0] == 4

    def read_small():
        with pytest.raises(CacheDamaged, match=r"latents .* 16,777,344 bytes, too many for the shape \(4, 8, 8\)"):
            store.read(tmp_path / "a.npz", ["latents"], {"latents": (4, 8, 8)})

    assert peak_of(read_small) < 1 << 20


def test_what_is_no_regular_file_is_damaged_and_can_be_replaced(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    assert store.summary(tmp_path / "a.npz") == {"damaged": "a named pipe, not a regular file"}
    store.write(tmp_path / "a.npz", ARRAYS)
    assert same(store.read(tmp_path / "a.npz"), ARRAYS)


def test_a_note_that_is_nested_without_end_is_damaged(tmp_path):
    store.write(tmp_path / "a.npz", {"provenance": np.frombuffer(b"[" * 200_000, np.uint8)})
    assert store.summary(tmp_path / "a.npz") == {"damaged": "its note cannot be read"}
