"""Text encoder outputs in memory and on disk: the right rows for every image, and no file used that is not theirs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from library.caching import store, text
from library.caching.encode_missing import Encoder as Work
from library.caching.text import TextRequest, cache_file, invalid_files, requests_of
from library.data.config.blueprint import build_specs
from library.data.sample.dataset import build_training_data
from library.errors import UserError
from library.options.base import Given, build_options
from library.options.data import DataOptions
from library.options.loss import LossOptions
from library.options.training import TrainingOptions
from library.runtime.logs import LOGGER
from library.runtime.processes import Processes
from library.types import FamilyTraits, TextCond, TextLayout
from library.version import NAME, VERSION

TRAITS = FamilyTraits("Test family", ("te",), 3, 8, 64, "ddpm", "_test.npz", 512, 1, 1.0)
LENGTH = 12
ALONE = Processes()
LAYOUT = TextLayout("_te.npz", ("states", "pooled", "mask"), {"apply_mask": True}, {"states": (LENGTH, 4)})
CAPTIONS = ["a red fox", "an owl", "a red fox", "", "zebra crossing"]  # four different ones


class Encoder(nn.Module):
    """A byte embedding, padded to LENGTH, that counts what it is asked."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(256, 4, dtype=dtype)
        self.calls = []

    def forward(self, captions):
        assert not torch.is_grad_enabled()
        self.calls.append(captions)
        return self.compute(captions)

    def compute(self, captions):
        tokens = torch.zeros(len(captions), LENGTH, dtype=torch.long)
        for row, caption in enumerate(captions):
            known = list(caption.encode()[:LENGTH])
            tokens[row, : len(known)] = torch.tensor(known, dtype=torch.long)
        states = self.table(tokens)
        return TextCond({"states": states, "pooled": states.amax(1), "mask": tokens > 0})

    @property
    def seen(self):
        return [caption for call in self.calls for caption in call]

    def row(self, caption):
        with torch.no_grad():
            return {name: value[0] for name, value in self.compute([caption]).tensors.items()}


class Bar:
    """Counts as tqdm does."""

    def __init__(self, total, desc, unit):
        self.total, self.unit, self.done = total, unit, 0
        Bar.last = self

    def update(self, count):
        self.done += count

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture
def items(tmp_path):
    return [TextRequest(tmp_path / f"{number}.png", caption) for number, caption in enumerate(CAPTIONS)]


@pytest.fixture
def image(tmp_path):
    """An image's item with a caption file, both of long ago."""
    path, words = tmp_path / "p.png", tmp_path / "p.txt"
    path.write_bytes(b"image")
    words.write_text("an owl")
    for file in (path, words):
        os.utime(file, (1000, 1000))
    return TextRequest(path, "an owl", caption_file=words)


def in_memory(items, encode, size=2, processes=ALONE):
    return text.cache_in_memory(items, Work(encode, size, processes=processes, progress=Bar))


class Reasons(logging.Handler):
    """Files that are made again, and why."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        if record.levelno == logging.WARNING:
            self.lines.append(record.getMessage().removeprefix("encoded again: "))


def on_disk(items, encode, layout=LAYOUT, name="encoder one", size=2, processes=ALONE, **more):
    """The store, and a line for each file that was made again."""
    reasons = Reasons()
    LOGGER.addHandler(reasons)
    try:
        work = Work(encode, size, processes=processes, progress=Bar)
        made_by = name if isinstance(name, dict) else {"te": name}
        return text.cache_on_disk(items, layout, work, made_by, **more), reasons.lines
    finally:
        LOGGER.removeHandler(reasons)


@dataclass(frozen=True)
class Impatient(Processes):
    """One of several processes that does not wait for the others."""

    def barrier(self):
        pass


def load(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---- in memory


def test_memory_holds_what_the_encoder_gives():
    encoder = Encoder()
    items = [TextRequest(Path("x.png"), caption) for caption in CAPTIONS]
    kept = in_memory(items, encoder, 3)
    assert encoder.calls == [["a red fox", "an owl", ""], ["zebra crossing"]]  # equal captions once
    assert (Bar.last.total, Bar.last.done, Bar.last.unit) == (4, 4, "captions")
    for number, caption in enumerate(CAPTIONS):
        assert same(kept.get(number), encoder.row(caption))


@dataclass(frozen=True)
class Thread(Processes):
    """A thread that stands for a process: what it hands over goes through `table`."""

    table: list = field(default_factory=list)
    gate: Barrier | None = None

    def all_gather(self, value):
        self.table[self.rank] = value
        self.gate.wait()
        values = list(self.table)
        self.gate.wait()
        return values


@pytest.mark.parametrize("world", [2, 3])
def test_memory_is_filled_by_all_processes_together(world):
    items = [TextRequest(Path("x.png"), caption) for caption in [*CAPTIONS, "a fifth", "a sixth", "a seventh"]]
    alone = Encoder()
    wanted = in_memory(items, alone, 2)
    table, gate, encoders = [None] * world, Barrier(world), [Encoder() for _ in range(world)]
    with ThreadPoolExecutor(world) as pool:
        threads = [Thread(rank, world, table, gate) for rank in range(world)]
        jobs = [pool.submit(in_memory, items, e, 2, t) for e, t in zip(encoders, threads, strict=True)]
        stores = [job.result(timeout=60) for job in jobs]
    # The very batches of one process, each encoded once.
    assert sorted(call for encoder in encoders for call in encoder.calls) == sorted(alone.calls)
    assert all(len(encoder.calls) < len(alone.calls) for encoder in encoders)
    for kept in stores:
        assert kept.places == wanted.places
        assert all(same(kept.get(number), wanted.get(number)) for number in range(len(items)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_memory_keeps_the_dtype(dtype):
    encoder = Encoder(dtype)
    row = in_memory([TextRequest(Path("x.png"), "an owl")], encoder, 1).get(0)
    assert (row["states"].dtype, row["mask"].dtype) == (dtype, torch.bool)
    assert same(row, encoder.row("an owl"))


def test_memory_pickles_each_batch_once():
    encoder = Encoder()
    items = [TextRequest(Path("x.png"), f"number {number}") for number in range(256)]
    kept = in_memory(items, encoder, 128)
    data = pickle.dumps(kept)
    assert len(data) < 2 * 256 * (LENGTH * 4 * 4 + 4 * 4 + LENGTH)
    assert same(pickle.loads(data).get(200), encoder.row("number 200"))


def test_no_items_need_no_encoder(tmp_path):
    encoder = Encoder()
    in_memory([], encoder, 2)
    made, reasons = on_disk([], encoder)
    assert (encoder.calls, made.files, reasons) == ([], (), [])


# ---- on disk


def test_files_are_as_the_format_has_them(items, tmp_path):
    encoder = Encoder()
    kept, reasons = on_disk(items, encoder)
    assert reasons == []
    assert sorted(encoder.seen) == sorted(set(CAPTIONS))
    assert (Bar.last.total, Bar.last.done, Bar.last.unit) == (5, 5, "files")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number}_te.npz" for number in range(5)]
    for number, caption in enumerate(CAPTIONS):
        arrays = load(tmp_path / f"{number}_te.npz")
        wanted = encoder.row(caption)
        assert set(arrays) == {"states", "pooled", "mask", "apply_mask", "provenance"}
        for name, value in wanted.items():
            assert arrays[name].dtype == value.numpy().dtype
            np.testing.assert_array_equal(arrays[name], value.numpy())
        assert (arrays["apply_mask"].dtype, arrays["apply_mask"].shape) == (np.bool_, ())
        assert arrays["apply_mask"]
        note = json.loads(arrays["provenance"].tobytes())
        assert (note["software"], note["version"], note["encoder"]) == (NAME, VERSION, {"te": "encoder one"})
        assert note["caption"] == hashlib.sha256(caption.encode()).hexdigest()[:32]
        assert same(kept.get(number), wanted)
    assert same(pickle.loads(pickle.dumps(kept)).get(1), kept.get(1))


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.bfloat16, "float32"), (torch.float16, "float16"), (torch.float32, "float32")]
)
def test_numbers_on_disk_are_exact(image, dtype, stored):
    encoder = Encoder(dtype)
    kept, _ = on_disk([image], encoder)
    array = load(cache_file(image, LAYOUT))["states"]
    assert array.dtype == stored
    np.testing.assert_array_equal(array.astype(np.float32), encoder.row("an owl")["states"].float().numpy())
    assert torch.equal(kept.get(0)["states"].to(dtype), encoder.row("an owl")["states"])


def test_images_that_share_a_stem_have_a_file_each(tmp_path):
    items = [
        TextRequest(tmp_path / "a.png", "x", shared_stem=True),
        TextRequest(tmp_path / "a.jpg", "y", shared_stem=True),
    ]
    kept, _ = on_disk(items, Encoder())
    assert {path.name for path in tmp_path.iterdir()} == {"a.png_te.npz", "a.jpg_te.npz"}
    assert same(kept.get(1), Encoder().row("y"))


def test_valid_files_are_not_made_again(items, tmp_path, monkeypatch):
    on_disk(items, Encoder())
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again, asked = Encoder(), []
    summary = store.summary
    monkeypatch.setattr(store, "summary", lambda path: asked.append(path.name) or summary(path))
    kept, reasons = on_disk(items, again)
    assert (again.calls, reasons) == ([], [])
    assert sorted(asked) == [f"{number}_te.npz" for number in range(5)]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    assert same(kept.get(4), again.row("zebra crossing"))


def test_one_image_in_two_datasets_has_one_file(image, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    relative = TextRequest(Path("p.png"), "an owl")
    written, write = [], store.write
    monkeypatch.setattr(store, "write", lambda path, arrays: written.append(path) or write(path, arrays))
    encoder = Encoder()
    kept, _ = on_disk([image, relative, image], encoder)
    assert (encoder.seen, len(written)) == (["an owl"], 1)
    assert all(same(kept.get(number), encoder.row("an owl")) for number in range(3))


def test_one_file_cannot_hold_two_captions(tmp_path):
    items = [TextRequest(tmp_path / f"{n}.png", words) for words in ("one", "two") for n in range(22)]
    with pytest.raises(UserError) as caught:
        on_disk(items, Encoder())
    assert len(caught.value.problems) == 21
    assert caught.value.problems[0] == f"{tmp_path / '0_te.npz'}: cannot hold both 'one' and 'two'"
    assert caught.value.problems[-1] == "and 2 more files"
    assert list(tmp_path.iterdir()) == []


# ---- files that cannot be used


def rewrite(path, **changes):
    """The file as numpy writes it, with some arrays changed; None takes one away."""
    arrays = {**load(path), **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"states.npy") + 150] ^= 0xFF  # within the array
    path.write_bytes(data)


SPOILED = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:100]), "damaged"),
    "emptied": (lambda path: path.write_bytes(b""), "damaged"),
    "a byte flipped": (flip_a_byte, "damaged"),
    "key gone": (lambda path: rewrite(path, pooled=None), "it has no pooled"),
    "flag gone": (lambda path: rewrite(path, apply_mask=None), "it has no apply_mask"),
    "text": (lambda path: rewrite(path, pooled=np.array("words")), "pooled is of the type <U5"),
    "fields": (lambda path: rewrite(path, pooled=np.zeros(4, [("x", "f4")])), "pooled is of the type [("),
    "foreign byte order": (lambda path: rewrite(path, pooled=np.zeros(4, ">f4")), "pooled is of the type >f4"),
    "NaN": (lambda path: rewrite(path, pooled=np.full(4, np.nan)), "NaN or infinite values in pooled"),
    "another length": (lambda path: rewrite(path, states=np.zeros((7, 4), np.float32)), "shape (7, 4), not (12, 4)"),
}


@pytest.mark.parametrize(("spoil", "reason"), SPOILED.values(), ids=SPOILED.keys())
def test_a_spoiled_file_is_named_and_made_again(items, spoil, reason):
    on_disk(items, Encoder())
    file = cache_file(items[1], LAYOUT)
    spoil(file)
    encoder = Encoder()
    kept, reasons = on_disk(items, encoder)
    assert encoder.seen == ["an owl"]
    assert len(reasons) == 1
    assert reasons[0].startswith(f"{file}: ")
    assert reason in reasons[0]
    assert same(kept.get(1), encoder.row("an owl"))
    assert on_disk(items, encoder)[1] == []


@pytest.mark.parametrize(
    ("caption", "name", "layout", "reason"),
    [
        ("a barn owl", "encoder one", LAYOUT, "made for another caption"),
        ("an owl", "encoder two", LAYOUT, "made by another text encoder"),
        (
            "an owl",
            "encoder one",
            TextLayout("_te.npz", LAYOUT.keys, {"apply_mask": False}),
            "not made with apply_mask False",
        ),
    ],
)
def test_a_file_made_otherwise_is_named_and_made_again(image, caption, name, layout, reason):
    on_disk([image], Encoder())
    encoder, item = Encoder(), TextRequest(image.image, caption)
    kept, reasons = on_disk([item], encoder, layout, name)
    assert len(reasons) == 1
    assert reasons[0].startswith(f"{cache_file(item, layout)}: {reason}")
    assert encoder.seen == [caption]
    assert same(kept.get(0), encoder.row(caption))
    assert bool(load(cache_file(item, layout))["apply_mask"]) == layout.flags["apply_mask"]


def test_files_are_read_without_the_encoders_that_made_them(items):
    """An encoder that is not there cannot disagree; one that is must have been there, unless nothing of it is read."""
    both = {"one": "a", "two": "b"}
    on_disk(items, Encoder(), name=both)
    for known, more, remade in (
        (both, {}, 0),
        ({"two": "b"}, {}, 0),
        ({}, {}, 0),
        ({"one": "new", "two": "b"}, {"skip_encoders": ["one"]}, 0),
        ({"one": "new", "two": "b"}, {}, len(items)),
        ({**both, "three": "c"}, {}, len(items)),
    ):
        on_disk(items, Encoder(), name=both)
        assert len(on_disk(items, Encoder(), name=known, **more)[1]) == remade, known


def test_files_that_would_have_to_be_made_are_named(items):
    on_disk(items[:3], Encoder())
    cache_file(items[1], LAYOUT).write_bytes(b"broken")
    found = invalid_files(items, LAYOUT)
    assert list(found) == [cache_file(items[number], LAYOUT) for number in (1, 3, 4)]
    assert [reason.split(" (")[0] for reason in found.values()] == ["damaged", "it is not there", "it is not there"]
    assert len(invalid_files(items, LAYOUT, check=False)) == 2


def test_without_checks_files_are_trusted(items):
    on_disk(items[:4], Encoder())
    cache_file(items[1], LAYOUT).write_bytes(b"broken")
    encoder = Encoder()
    kept, reasons = on_disk(items, encoder, name="encoder two", check=False)
    assert (encoder.seen, reasons) == (["zebra crossing"], [])
    with pytest.raises(UserError, match=r"1_te\.npz"):
        kept.get(1)


# ---- files of earlier trainers, without a note


@pytest.fixture
def foreign(image):
    """Writes such a file, newer than caption and image, for what `image` is not; gives its path."""

    def write(age=2000, **changes):
        path = cache_file(image, LAYOUT)
        rows = {name: value.numpy() for name, value in Encoder().row("written elsewhere").items()}
        arrays = {**rows, "apply_mask": np.array(True), **changes}
        np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
        os.utime(path, (age, age))
        return path

    return write


def test_a_foreign_file_is_used(image, foreign):
    before, encoder = foreign().read_bytes(), Encoder()
    kept, reasons = on_disk([image], encoder)
    assert (encoder.calls, reasons) == ([], [])
    assert same(kept.get(0), encoder.row("written elsewhere"))
    assert cache_file(image, LAYOUT).read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "item", "reason"),
    [
        ({"age": 500}, {}, "is older than p.txt"),
        ({"age": 500}, {"caption_file": None}, "is older than p.png"),
        ({}, {"changed": True}, "what earlier trainers put there is the caption file as it is"),
        ({"apply_mask": np.array(False)}, {}, "not made with apply_mask True"),
        ({"apply_mask": np.array([True, False])}, {}, "not made with apply_mask True"),
        ({"apply_mask": None}, {}, "it has no apply_mask"),
        ({"mask": None}, {}, "it has no mask"),
        ({"pooled": np.array([1, np.nan, 0, 0])}, {}, "NaN or infinite values in pooled"),
        ({"pooled": np.array([1, np.inf, 0, 0], np.float16)}, {}, "NaN or infinite values in pooled"),
    ],
)
def test_a_foreign_file_that_does_not_fit_is_named_and_made_again(image, foreign, changes, item, reason):
    path, encoder = foreign(**changes), Encoder()
    item = TextRequest(**{**vars(image), **item})
    kept, reasons = on_disk([item], encoder)
    assert len(reasons) == 1
    assert reasons[0].startswith(f"{path}: ")
    assert reason in reasons[0]
    assert encoder.seen == ["an owl"]
    assert same(kept.get(0), encoder.row("an owl"))
    assert on_disk([item], encoder)[1] == []


# ---- interruptions and several processes


def test_an_interrupted_run_is_resumed(tmp_path):
    items = [TextRequest(tmp_path / f"{number}.png", f"number {number}") for number in range(9)]

    class Breaks(Encoder):
        def forward(self, captions):
            if len(self.calls) == 3:
                raise RuntimeError("out of memory")
            return super().forward(captions)

    with pytest.raises(RuntimeError, match="out of memory"):
        on_disk(items, Breaks())
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number}_te.npz" for number in range(6)]
    encoder = Encoder()
    kept, reasons = on_disk(items, encoder)
    assert (encoder.seen, reasons) == (["number 6", "number 7", "number 8"], [])
    assert all(same(kept.get(number), encoder.row(item.caption)) for number, item in enumerate(items))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_work(items, tmp_path, monkeypatch, world):
    written, write = [], store.write
    monkeypatch.setattr(store, "write", lambda path, arrays: written.append(path.name) or write(path, arrays))
    encoders = [Encoder() for _ in range(world)]
    for rank in reversed(range(world)):  # each finds what the others have done already
        kept, reasons = on_disk(items, encoders[rank], processes=Impatient(rank, world))
        assert reasons == []
    assert all(encoder.calls for encoder in encoders)
    assert sorted(caption for encoder in encoders for caption in encoder.seen) == sorted(set(CAPTIONS))
    assert sorted(written) == [f"{number}_te.npz" for number in range(5)]
    assert all(same(kept.get(number), Encoder().row(caption)) for number, caption in enumerate(CAPTIONS))


def test_each_process_checks_its_share(items, monkeypatch):
    on_disk(items, Encoder())
    asked, summary = [[], []], store.summary
    for rank in range(2):
        look = lambda path, rank=rank: asked[rank].append(path.name) or summary(path)  # noqa: E731
        monkeypatch.setattr(store, "summary", look)
        on_disk(items, Encoder(), processes=Impatient(rank, 2))
    assert asked == [["0_te.npz", "2_te.npz", "3_te.npz"], ["1_te.npz", "4_te.npz"]]


# ---- what goes wrong


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_captions_that_break_the_encoder_are_named(items, tmp_path, number):
    encoder = Encoder()
    with torch.no_grad():
        encoder.table.weight[ord("z")] = number
    for cache in (lambda: in_memory(items, encoder, 2), lambda: on_disk(items, encoder)):
        with pytest.raises(UserError) as caught:
            cache()
        assert len(caught.value.problems) == 1
        assert caught.value.problems[0].startswith(f"{items[4].image}: the text encoder gives NaN")
    assert not cache_file(items[4], LAYOUT).exists()
    assert cache_file(items[0], LAYOUT).exists()


def test_what_one_image_lacks_is_reported_and_the_others_are_written(items, tmp_path):
    encoder, told = Encoder(), {}
    with torch.no_grad():
        encoder.table.weight[ord("z")] = float("nan")
    long = TextRequest(tmp_path / ("n" * 300) / "a.png", "an owl")
    on_disk([*items, long], encoder, name={}, on_error=lambda image, why: told.update({image: why}))
    assert list(told) == [long.image, items[4].image] or list(told) == [items[4].image, long.image]
    assert "the text encoder gives NaN or infinite values for its caption" in told[items[4].image]
    assert "too long" in told[long.image]
    assert [cache_file(item, LAYOUT).exists() for item in items] == [True] * 4 + [False]
    assert Bar.last.done == Bar.last.total == 6
    with pytest.raises(UserError, match="too long") as caught:
        on_disk([long], encoder)
    assert caught.value.hint.startswith("shorten the image's name")


def test_names_that_are_too_long_are_shortened_and_stay_apart(tmp_path):
    names = [f"{'猫' * 82}{end}.png" for end in "ab"]
    items = [TextRequest(tmp_path / name, "an owl") for name in names]
    data_store, _ = on_disk(items, Encoder())
    assert len({cache_file(item, LAYOUT) for item in items}) == 2
    for number, item in enumerate(items):
        assert cache_file(item, LAYOUT).name.startswith("猫" * 70)
        assert len(cache_file(item, LAYOUT).name.encode()) <= 255
        assert data_store.get(number)
    assert Bar.last.done == 2
    on_disk(items, Encoder())
    assert Bar.last.done == 2, "nothing is made again"


def test_what_a_killed_run_has_left_is_removed_and_an_empty_file_is_made_again(items, tmp_path):
    on_disk(items[:2], Encoder())
    left = tmp_path / f".{cache_file(items[0], LAYOUT).name}.abcd1234.tmp"
    other = tmp_path / ".another.npz.abcd1234.tmp"
    for path in (left, other, cache_file(items[0], LAYOUT)):  # as a power cut leaves a file that was not flushed
        path.write_bytes(b"")
    data_store, reasons = on_disk(items[:2], Encoder())
    assert len(reasons) == 1
    assert "the file is empty" in reasons[0]
    assert data_store.get(0)
    assert other.exists()
    assert not left.exists()


def test_an_encoder_that_does_not_fit_the_layout_is_refused(items):
    with pytest.raises(ValueError, match="the files hold"):
        on_disk(items, Encoder(), TextLayout("_te.npz", ("states",)))
    with pytest.raises(ValueError, match="rows for 2 captions"):
        in_memory(items, lambda captions: TextCond({"x": torch.zeros(1, 3)}), 2)


def test_a_file_that_cannot_be_written_is_named(image):
    cache_file(image, LAYOUT).mkdir()
    with pytest.raises(UserError, match=r"p_te\.npz: the cache file cannot be written"):
        on_disk([image], Encoder())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (Path.unlink, "No such file"),
        (lambda path: path.write_bytes(b"PK"), "cannot be used"),
        (lambda path: rewrite(path, pooled=None), "cannot be used"),
        (lambda path: rewrite(path, pooled=np.full(4, np.nan)), "NaN"),
    ],
)
def test_a_file_that_breaks_during_the_run_is_named(image, spoil, reason):
    kept, _ = on_disk([image], Encoder())
    spoil(cache_file(image, LAYOUT))
    with pytest.raises(UserError, match=reason) as caught:
        kept.get(0)
    assert str(cache_file(image, LAYOUT)) in str(caught.value)


# ---- batches


def test_rows_make_a_batch():
    encoder = Encoder()
    kept = in_memory([TextRequest(Path("x.png"), caption) for caption in CAPTIONS], encoder, 3)
    cond = TextCond.stack([kept.get(4), kept.get(0)])
    with torch.no_grad():
        assert same(cond.tensors, encoder(["zebra crossing", "a red fox"]).tensors)


def trimmed(captions):
    """As long as the longest caption of the batch."""
    length = max(len(caption) for caption in captions)
    rows = [torch.tensor(list(caption.ljust(length).encode())) for caption in captions]
    return TextCond({"out": torch.stack(rows).float()[..., None]})


def test_rows_may_differ_in_length_but_not_within_a_batch(tmp_path):
    layout = TextLayout("_t.npz", ("out",))
    items = [TextRequest(tmp_path / f"{number}.png", words) for number, words in enumerate(["ab", "abcd", "xy"])]
    in_files, _ = on_disk(items, trimmed, layout, size=1)
    for kept in (in_files, in_memory(items, trimmed, 1)):
        assert [tuple(kept.get(number)["out"].shape) for number in range(3)] == [(2, 1), (4, 1), (2, 1)]
        assert TextCond.stack([kept.get(0), kept.get(2)]).tensors["out"].shape == (2, 2, 1)
        with pytest.raises(UserError, match="out has 2x1 and 4x1"):
            TextCond.stack([kept.get(0), kept.get(1)])


# ---- a real text encoder


def test_outputs_of_a_real_text_encoder(items):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH + 2,
        bos_token_id=257,
        eos_token_id=258,
        pad_token_id=259,
    )
    model = CLIPTextModelWithProjection(config).eval()

    def encode(captions):
        known = [list(caption.encode()[:LENGTH]) for caption in captions]
        tokens = torch.tensor([[257, *k, 258, *[259] * (LENGTH - len(k))] for k in known])
        out = model(tokens, output_hidden_states=True)
        return TextCond({"hidden_state1": out.hidden_states[-2], "pool1": out.text_embeds})

    layout = TextLayout("_real_te.npz", ("hidden_state1", "pool1"), shapes={"hidden_state1": (LENGTH + 2, 16)})
    in_files, _ = on_disk(items, encode, layout)
    kept_in_memory = in_memory(items, encode)
    with torch.no_grad():
        wanted = encode(CAPTIONS)
    for kept in (in_files, kept_in_memory):
        cond = TextCond.stack([kept.get(number) for number in range(len(items))])
        assert not any(tensor.requires_grad for tensor in cond.tensors.values())
        for name, value in wanted.tensors.items():  # float32 sums in another batch
            torch.testing.assert_close(cond.tensors[name], value, rtol=1e-5, atol=1e-6)


# ---- in a data set


class Letters:
    """An encoder that tells captions apart: their length and their first letter."""

    def __call__(self, captions):
        rows = [[float(len(caption)), float(ord(caption[0]))] for caption in captions]
        return TextCond({"out": torch.tensor(rows)})


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_every_batch_has_the_outputs_of_its_captions(tmp_path, kind):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, caption in enumerate(["one", "two", "three", "three", "fifth image", "six"]):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.caption").write_text(caption)
    subset = {"image_dir": str(folder), "caption_prefix": "a photo,", "num_repeats": 2}
    config = tmp_path / "data.json"
    table = {"resolution": 64, "batch_size": 2, "validation_split": 0.3, "subsets": [subset]}
    config.write_text(json.dumps({"datasets": [table]}))
    given = {"dataset_config": config, "max_data_loader_n_workers": 0}
    groups = (DataOptions, LossOptions, TrainingOptions)
    opts = build_options(groups, {name: Given(value, "command line") for name, value in given.items()})
    data = build_training_data(build_specs(opts, TRAITS), opts, TRAITS, 1)
    items = requests_of(data.all_records)
    if kind == "memory":
        data.set_text(in_memory(items, Letters()))
    else:
        data.set_text(on_disk(items, Letters(), TextLayout("_te.npz", ("out",)))[0])
    seen = []
    for part in (data, data.held_out):
        for batch in part.loader(1):
            assert torch.equal(batch.text.tensors["out"], Letters()(batch.captions).tensors["out"])
            seen += batch.captions
    assert sorted(set(seen)) == sorted(f"a photo, {c}" for c in ("one", "two", "three", "fifth image", "six"))
