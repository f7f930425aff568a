"""make_captions.py and make_captions_by_git.py as a user runs them, on tiny models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.builders.captioners import tiny_blip, write_blip_folder, write_git_folder, write_original_blip
from tests.scripts.starting import OFFLINE

ROOT = Path(__file__).resolve().parents[2]
GOOD = ["one.png", "Zwei 2.JPG", "三つ.webp", "sub/😀.png"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model = tiny_blip()
    write_blip_folder(model, folder / "blip")
    write_original_blip(model, folder / "original" / "model.pth")
    write_git_folder(folder / "git")
    return folder


def image_folder(place: Path) -> Path:
    """Four good images, one of them in a sub-folder, and a broken one among them."""
    draw = np.random.default_rng(0)
    (place / "sub").mkdir(parents=True)
    for number, name in enumerate(GOOD):
        pixels = draw.integers(0, 100, (40 + 30 * number, 60, 3)) + draw.integers(0, 156, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(place / name)
    (place / "broken.png").write_bytes((place / "one.png").read_bytes()[:500])
    return place


def captions_in(place: Path, extension: str = ".caption") -> dict[str, str]:
    return {p.relative_to(place).as_posix(): p.read_text(encoding="utf-8") for p in place.rglob(f"*{extension}")}


@pytest.fixture(scope="module")
def captioned(run_script, models, tmp_path_factory):
    """A folder after `python finetune/make_captions.py --batch_size 3 ... <folder>`, and what was said."""
    place = image_folder(tmp_path_factory.mktemp("captioned") / "train_data")
    found = run_script(
        "finetune/make_captions.py",
        "--batch_size",
        "3",
        str(place),
        f"--caption_weights={models / 'blip'}",
        "--max_length=20",
        "--seed",
        "42",
        "--recursive",
        "--debug",
    )
    return place, found


@pytest.mark.rows("C1", "C2", "C3", "R12", "R60", "R62", "R63", "R65")
def test_every_good_image_gets_a_line_beside_it(captioned):
    place, found = captioned
    assert found.returncode == 0, found.stderr
    captions = captions_in(place)
    assert sorted(captions) == sorted(str(Path(name).with_suffix(".caption").as_posix()) for name in GOOD)
    assert all(text.endswith("\n") and text.count("\n") == 1 for text in captions.values())
    assert len(set(captions.values())) > 1
    assert not list(place.rglob("*.tmp"))


def test_the_broken_image_is_named_and_counted(captioned):
    _, found = captioned
    assert "4 done, 1 failed" in found.stderr
    assert "broken.png: the file is truncated" in found.stderr
    assert "Traceback" not in found.stderr


def test_debug_prints_the_captions(captioned):
    place, found = captioned
    assert f"{place / 'one.png'}: {(place / 'one.caption').read_text(encoding='utf-8')}" in found.stdout


@pytest.mark.rows("R60", "R62", "R65", "R66")
def test_the_original_weights_from_inside_the_folder_give_the_same_again(captioned, models, tmp_path):
    """Same seed, another batch size, images missing in between, another place: each image's caption stays."""
    before = captions_in(captioned[0])
    place = image_folder(tmp_path / "elsewhere")
    (place / "one.txt").write_text("kept\n", encoding="utf-8")
    found = subprocess.run(
        [
            sys.executable,
            "make_captions.py",
            os.path.relpath(place, ROOT / "finetune"),
            f"--caption_weights={models / 'original' / 'model.pth'}",
            "--max_length=20",
            "--caption_extention=.txt",
            "--skip_existing",
            "--recursive",
            "--strict",
        ],
        cwd=ROOT / "finetune",
        env={**os.environ, **OFFLINE},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert found.returncode == 1, found.stderr  # --strict, and one is broken
    assert "3 done, 1 skipped, 1 failed" in found.stderr
    after = captions_in(place, ".txt")
    assert after.pop("one.txt") == "kept\n"
    assert after == {name.replace(".caption", ".txt"): text for name, text in before.items() if name != "one.caption"}


@pytest.mark.rows("R12")
def test_git(run_script, models, tmp_path):
    place = image_folder(tmp_path / "train_data")
    shutil.rmtree(place / "sub")
    found = run_script(
        "finetune/make_captions_by_git.py",
        str(place),
        f"--model_id={models / 'git'}",
        "--batch_size=2",
        "--max_length=15",
        "--remove_words",
    )
    assert found.returncode == 0, found.stderr
    assert "3 done, 1 failed" in found.stderr
    captions = captions_in(place)
    assert len(captions) == 3
    assert all(text.strip() for text in captions.values())


@pytest.mark.rows("R61")
def test_without_network_the_default_weights_are_asked_for_in_one_line(run_script, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINSCRIPTS_CACHE", str(tmp_path / "cache"))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    found = run_script("finetune/make_captions.py", str(tmp_path))
    assert found.returncode == 2
    (error,) = [line for line in found.stderr.splitlines() if line.startswith("error:")]
    assert "model_large_caption.pth: cannot be downloaded" in error
    assert str(tmp_path / "cache" / "weights" / "model_large_caption.pth") in error
    assert "Traceback" not in found.stderr
