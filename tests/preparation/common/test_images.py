from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from library.errors import UserError
from library.options.captioning import CaptionOptions
from library.options.tagging import TaggingOptions
from library.preparation.captioning.make_captions import caption_folder
from library.preparation.common.images import (
    all_gather,
    find_images,
    in_batches,
    is_first,
    my_share,
    read_ahead,
    require_room_beside,
)
from library.preparation.common.summary import Outcome
from library.preparation.tagging.tag_outputs import tag_place
from library.runtime.logs import LOGGER

ROOT = Path(__file__).parents[3]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(folder: Path, *, recursive: bool) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_images(folder, recursive=recursive)]


def test_images_are_found_sorted_and_nothing_else(tmp_path):
    touch(
        tmp_path, "b.PNG", "a.jpg", "a.txt", "._c.png", "sub/d.webp", "sub/deep/e.bmp", ".hidden/f.png", "sub.png/g.png"
    )
    assert found(tmp_path, recursive=False) == ["a.jpg", "b.PNG"]
    assert found(tmp_path, recursive=True) == ["a.jpg", "b.PNG", "sub/d.webp", "sub/deep/e.bmp", "sub.png/g.png"]


@pytest.mark.skipif(os.name == "nt", reason="making links needs a right that users seldom have")
def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    touch(tmp_path, "in/a.png", "elsewhere/b.png")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in", target_is_directory=True)
    assert found(tmp_path / "in", recursive=True) == ["a.png", "link/b.png"]


def test_what_is_no_folder_or_has_no_images_is_refused(tmp_path):
    touch(tmp_path, "a.txt", "sub/b.txt")
    for folder, message in ((tmp_path / "none", "there is no folder"), (tmp_path / "a.txt", "there is no folder")):
        with pytest.raises(UserError, match=message):
            find_images(folder, recursive=True)
    with pytest.raises(UserError, match=r"there are no images in .* itself"):
        find_images(tmp_path, recursive=False)
    with pytest.raises(UserError, match=r"there are no images in .* or below it"):
        find_images(tmp_path, recursive=True)


def test_images_of_other_kinds_are_reported(tmp_path, caplog):
    LOGGER.propagate = True
    touch(tmp_path, "a.png", "b.tiff", "c.GIF", "d.gif")
    with caplog.at_level(logging.WARNING, LOGGER.name):
        find_images(tmp_path, recursive=False)
    (message,) = caplog.messages
    assert ".gif, .tiff" in message


PATHS = [Path(f"{number:02}.png") for number in range(40)]


@pytest.mark.parametrize("workers", [0, 1, 3, None])
def test_reading_keeps_the_order_and_goes_on_behind_a_bad_image(workers):
    bad = {PATHS[0]: UserError("no image"), PATHS[7]: OSError(5, "disk gone"), PATHS[39]: ValueError("cut off")}
    bad[PATHS[20]] = MemoryError()

    def read(path: Path) -> str:
        if path in bad:
            raise bad[path]
        time.sleep(0.001 * (int(path.stem) % 3))
        return path.stem

    outcome = Outcome()
    taken = list(read_ahead(PATHS, read, outcome, workers=workers, desc="reading"))
    assert taken == [(path, path.stem) for path in PATHS if path not in bad]
    reasons = {PATHS[0]: "no image", PATHS[7]: "disk gone", PATHS[39]: "cut off"}
    assert outcome.failed == {**reasons, PATHS[20]: "there is not enough memory for it"}


def test_a_fault_of_the_program_is_not_taken_for_a_bad_image():
    def read(path: Path) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(read_ahead(PATHS, read, Outcome(), workers=2, desc="reading"))


@pytest.mark.parametrize(("batch", "ahead"), [(1, 4), (3, 4), (16, 16)])
def test_reading_is_ahead_by_a_batch_but_only_a_little(batch, ahead):
    started: list[Path] = []
    many = [Path(f"{number}.png") for number in range(300)]

    def read(path: Path) -> Path:
        started.append(path)
        return path

    most = 0
    for taken, (_path, _) in enumerate(read_ahead(many, read, Outcome(), workers=2, desc="reading", batch=batch)):
        deadline = time.monotonic() + 5
        while len(started) < min(taken + 1 + ahead, 300) and time.monotonic() < deadline:
            time.sleep(0.001)  # nobody asks for more meanwhile: these are read while a batch is worked on
        most = max(most, len(started) - taken)
    assert len(started) == 300
    assert most == ahead + 1


def test_reading_that_is_given_up_ends_its_threads():
    before = set(threading.enumerate())

    def readers() -> list[threading.Thread]:
        new = [thread for thread in threading.enumerate() if thread not in before]
        return [thread for thread in new if thread.name.startswith("ThreadPoolExecutor")]  # not the progress bar's

    reading = read_ahead(PATHS, lambda path: path, Outcome(), workers=4, desc="reading")
    next(reading)
    assert readers()
    reading.close()
    deadline = time.monotonic() + 5
    while readers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not readers()


@pytest.mark.parametrize(
    ("count", "size", "sizes"), [(0, 2, []), (1, 2, [1]), (4, 2, [2, 2]), (5, 2, [2, 2, 1]), (3, 8, [3])]
)
def test_batches(count, size, sizes):
    batches = list(in_batches(iter(range(count)), size))
    assert [len(batch) for batch in batches] == sizes
    assert [item for batch in batches for item in batch] == list(range(count))


def test_one_process_does_everything(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert my_share(PATHS) == PATHS
    assert is_first()
    assert all_gather("x") == ["x"]


def test_processes_share_the_work(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(my_share(PATHS))
        assert is_first() is (rank == 0)
    assert sorted(path for share in shares for path in share) == PATHS
    assert {len(share) for share in shares} == {13, 14}


def test_what_shares_a_file_stays_in_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    paths = [Path(name) for name in ("a.jpg", "a.jpg.png", "a.png", "b.png", "c/a.png", "c/b.JPG", "c/b.webp")]
    shares = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        shares.append({path.as_posix() for path in my_share(paths)})
    assert shares == [{"a.jpg", "a.png", "b.png", "c/b.JPG", "c/b.webp"}, {"a.jpg.png", "c/a.png"}]


def test_processes_without_a_gpu_know_each_other(run_script, tmp_path):
    """Whoever asks accelerate afterwards, too."""
    script = tmp_path / "script.py"
    script.write_text("""
from accelerate import Accelerator
from library.preparation.common.images import all_gather, processes
from pathlib import Path
rank = processes().rank
values = all_gather(f"of {rank}")
Path(__file__).with_name(f"said {rank}").write_text(f"{values} {Accelerator(cpu=True).num_processes}")
processes().close()
""")
    done = run_script(script, processes=2, variables={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / f"said {rank}").read_text() for rank in range(2)] == ["['of 0', 'of 1'] 2"] * 2


def test_looking_for_images_imports_nothing_heavy(tmp_path):
    touch(tmp_path, "a.png")
    code = """
import sys
from library.preparation.common.summary import Outcome
from library.preparation.common.images import find_images, all_gather, read_ahead
from library.preparation.common.script import run_script
from pathlib import Path
paths = find_images(Path(sys.argv[1]), recursive=True)
assert len(list(read_ahead(paths, len_of, Outcome(), workers=1, desc="x"))) == 1
all_gather(1)
print(*{"torch", "transformers", "accelerate"} & set(sys.modules))
""".replace("len_of", "lambda path: len(path.name)")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


@pytest.fixture
def closed(monkeypatch):
    """Folders where no file can be made from now on; the tests may be run by one who may write anywhere."""
    folders, make = set(), tempfile.TemporaryFile

    def refuse(*words, dir=None, **options):
        if Path(dir) in folders:
            raise PermissionError(errno.EACCES, "Permission denied")
        return make(*words, dir=dir, **options)

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    return folders


def test_folders_that_cannot_be_written_to_are_reported_in_one_line(tmp_path, closed):
    images = [tmp_path / place / "a.png" for place in "abc"]
    for image in images:
        image.parent.mkdir()
    require_room_beside(images, "tag files")
    assert [list(image.parent.iterdir()) for image in images] == [[]] * 3
    closed |= {tmp_path / "b", tmp_path / "c"}
    require_room_beside(images[:1], "tag files")
    with pytest.raises(UserError) as refused:
        require_room_beside(images, "tag files")
    assert refused.value.problems == (
        f"{tmp_path / 'b'}: tag files cannot be written in this folder (Permission denied), nor in 1 more; make it "
        "writable, or work on a copy",
    )


def test_no_model_is_loaded_for_a_folder_that_cannot_be_written_to(tmp_path, closed):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    closed.add(tmp_path)
    for skip in (False, True):
        given = CaptionOptions(train_data_dir=str(tmp_path), skip_existing=skip)
        with pytest.raises(UserError, match="caption files cannot be written in this folder"):
            caption_folder(given, pytest.fail)
        with pytest.raises(UserError, match="tag files cannot be written in this folder"):
            tag_place(TaggingOptions(train_data_dir=str(tmp_path), skip_existing=skip), [tmp_path / "a.png"])
    for ending in (".caption", ".txt"):
        (tmp_path / "a").with_suffix(ending).write_text("there")
    assert caption_folder(given, pytest.fail).skipped == 1
    tag_place(TaggingOptions(train_data_dir=str(tmp_path), skip_existing=True), [tmp_path / "a.png"])
