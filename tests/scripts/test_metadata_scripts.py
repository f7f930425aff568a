"""merge_captions_to_metadata.py, merge_dd_tags_to_metadata.py and clean_captions_and_tags.py as users start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path):
    """A script of finetune/, started from the folder of the data; or, with `inside`, from its own."""

    def run(script: str, *line: object, inside: bool = False) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, script if inside else str(ROOT / "finetune" / script), *map(str, line)],
            cwd=ROOT / "finetune" if inside else tmp_path,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},  # a console that cannot show every letter
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


@pytest.fixture
def two_folders(tmp_path):
    for name in ("train_data1", "train_data2"):
        (tmp_path / name).mkdir()
        for stem in "ab":
            (tmp_path / name / f"{stem}.png").touch()
            (tmp_path / name / f"{stem}.caption").write_text(f"a young woman 女 of {name}", encoding="utf-8")
            (tmp_path / name / f"{stem}.txt").write_text("white_shirt, shirt", encoding="utf-8")
    return tmp_path


def load(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.rows("C10", "C11", "C14", "C15", "C18", "C19", "R92", "R93", "R99")
def test_one_folder_from_text_files_to_clean_metadata(run, two_folders):
    steps = [
        run("merge_captions_to_metadata.py", "train_data1", "meta_cap.json"),
        run("merge_captions_to_metadata.py", "train_data2", "--in_json", "meta_cap.json", "other_cap.json", "--debug"),
        run("merge_dd_tags_to_metadata.py", "train_data1", "--in_json", "meta_cap.json", "meta_cap_dd.json"),
        run(
            "clean_captions_and_tags.py",
            two_folders / "meta_cap_dd.json",
            two_folders / "meta_clean.json",
            inside=True,
        ),
    ]
    assert [step.returncode for step in steps] == [0, 0, 0, 0], [step.stderr for step in steps]
    caption = "a young woman 女 of train_data1"
    assert load(two_folders / "meta_cap.json") == {"a": {"caption": caption}, "b": {"caption": caption}}
    assert load(two_folders / "other_cap.json")["a"] == {"caption": "a young woman 女 of train_data2"}
    assert os.path.join("train_data2", "a.caption") + ": caption of a: " in steps[1].stderr
    cleaned = {"caption": "a girl 女 of train_data1", "tags": "white shirt"}
    assert load(two_folders / "meta_clean.json") == {"a": cleaned, "b": cleaned}
    assert "2 done" in steps[3].stderr


@pytest.mark.rows("C12", "C13", "C16", "C17", "R96")
def test_two_folders_by_full_path(run, two_folders):
    line = "--full_path"
    steps = [
        run("merge_captions_to_metadata.py", line, "train_data1", "meta_cap1.json"),
        run("merge_captions_to_metadata.py", line, "--in_json", "meta_cap1.json", "train_data2", "meta_cap2.json"),
        run("merge_dd_tags_to_metadata.py", line, "--in_json", "meta_cap2.json", "train_data1", "meta_cap_dd1.json"),
        run("merge_dd_tags_to_metadata.py", line, "--in_json", "meta_cap_dd1.json", "train_data2", "meta_cap_dd2.json"),
    ]
    assert [step.returncode for step in steps] == [0, 0, 0, 0], [step.stderr for step in steps]
    found = load(two_folders / "meta_cap_dd2.json")
    assert list(found) == [
        str(two_folders / folder / name) for folder in ("train_data1", "train_data2") for name in ("a.png", "b.png")
    ]
    assert all(set(entry) == {"caption", "tags"} for entry in found.values())


def test_what_fails_is_one_line_and_a_status(run, two_folders):
    missing = run("merge_captions_to_metadata.py", "train_data1", "out.json", "--in_json", "none.json", "--recursive")
    assert missing.returncode == 2
    assert missing.stderr == (
        "error: 2 problems\n"
        "  --in_json: there is no file 'none.json'\n"
        "  --recursive: needs --full_path, as images in several folders may have the same name\n"
    )
    (two_folders / "train_data1" / "a.caption").write_bytes(b"caf\xe9")
    (two_folders / "file").touch()
    line = ("merge_captions_to_metadata.py", "train_data1", "out.json", "--caption_extention=.caption")
    broken, strict = run(*line), run(*line, "--strict")
    assert (broken.returncode, strict.returncode) == (0, 1)
    assert "--caption_extention: deprecated; use --caption_extension" in broken.stderr
    assert "1 done, 1 failed" in broken.stderr
    assert list(load(two_folders / "out.json")) == ["b"]
    unwritable = run("merge_captions_to_metadata.py", "train_data2", os.path.join("file", "out.json"))
    assert unwritable.returncode == 2
    (line,) = unwritable.stderr.splitlines()  # before any image is looked at
    assert line.startswith(f"error: out_json: {os.path.join('file', 'out.json')} cannot be written")
