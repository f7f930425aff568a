"""Tagging as a user runs it, with tiny ONNX taggers. What must come out is worked out again, by numpy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.builders.hub_server import running_hub
from tests.builders.onnx_file import write_tagger

pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "finetune" / "tag_images_by_wd14_tagger.py")

SIDE = 8
RATINGS = ["safe", "sensitive", "questionable", "explicit"]
GENERAL = ["1girl", "long_hair", "smile", "^_^", "red_hat", "outdoors", "blue_sky", "simple_background"]
CHARACTERS = ["saber_(fate)", "hatsune_miku"]
LABELS = [*RATINGS, *GENERAL, *CHARACTERS]
CATEGORIES = [*[9] * 4, *[0] * len(GENERAL), *[4] * len(CHARACTERS)]


def make_weights(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    weight = rng.normal(scale=0.002, size=(SIDE * SIDE * 3, len(LABELS)))
    return weight.astype(np.float32), rng.normal(size=len(LABELS)).astype(np.float32)


def write_model(folder: Path, seed: int = 0, batch: int | str = "N") -> None:
    write_tagger(folder / "model.onnx", *make_weights(seed), (batch, SIDE, SIDE, 3))
    (folder / "selected_tags.csv").write_text(labels_text(), encoding="utf-8")


def labels_text() -> str:
    rows = [f"{n},{name},{category},1" for n, (name, category) in enumerate(zip(LABELS, CATEGORIES, strict=True))]
    return "\n".join(["tag_id,name,category,count", *rows]) + "\n"


def write_image(path: Path, seed: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """Saves an image of blocks of two by two pixels; returns what the tagger must see of it, (8, 8, 3) RGB."""
    blocks = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blocks.repeat(2, axis=0).repeat(2, axis=1)).save(path)
    seen = np.full((SIDE, SIDE, 3), 255, np.uint8)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    seen[top : top + height, left : left + width] = blocks
    return seen


def answers(seen: np.ndarray, seed: int) -> np.ndarray:
    """Probabilities by label."""
    weight, bias = make_weights(seed)
    inputs = seen[..., [2, 1, 0]].astype(np.float64).reshape(-1)
    return 1 / (1 + np.exp(-(inputs @ weight + bias)))


def expected_tags(seen: np.ndarray, seed: int = 0, thresh: float = 0.35) -> list[str]:
    """General and character tags, in the order of the labels."""
    found = answers(seen, seed)
    assert np.abs(found[4:] - thresh).min() > 1e-4, "a number of this test lies on the threshold"
    return [name for name, p in zip(LABELS[4:], found[4:], strict=True) if p >= thresh]


def run(cwd: Path, *arguments: object, **environment: str):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "PYTHONIOENCODING": "utf-8", **environment}
    line = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(
        line, cwd=cwd, env=env, capture_output=True, text=True, encoding="utf-8", timeout=300, check=False
    )


def told(done: subprocess.CompletedProcess) -> str:
    """What is on the screen, after checking that there is nothing about missing GPU libraries."""
    shown = done.stdout + done.stderr
    for word in ("Traceback", "onnxruntime", "libcu", "cuDNN", "ExecutionProvider"):
        assert word not in shown, shown[-2000:]
    return shown


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*.txt")}


def text_of(image: Path) -> str:
    return image.with_suffix(".txt").read_text(encoding="utf-8")


@pytest.mark.rows("C8", "C9", "R12", "R74", "R75", "R76", "R79", "R87")
def test_the_command_of_the_guides(tmp_path):
    """From the folder of the scripts; then again, in the ways that leave alone what is there."""
    here, data = tmp_path / "finetune", tmp_path / "train_data"
    write_model(here / "wd14_tagger_model" / "SmilingWolf_wd-v1-4-convnext-tagger-v2")
    seen = {
        data / name: write_image(data / name, seed, *size)
        for seed, (name, size) in enumerate(
            {"a.png": (), "wide.png": (4, 8), "täll 絵.png": (8, 6), "d.v2.bmp": (), "e.png": ()}.items()
        )
    }
    (data / "broken.png").write_bytes((data / "a.png").read_bytes()[:60])
    expected = {path: expected_tags(pixels) for path, pixels in seen.items()}
    assert len({tuple(tags) for tags in expected.values()}) > 2

    done = run(here, "--batch_size", 4, os.path.join("..", "train_data"))
    shown = told(done)
    assert done.returncode == 0, shown
    assert {path: text_of(path) for path in seen} == {path: ", ".join(tags) + "\n" for path, tags in expected.items()}
    assert not (data / "broken.txt").exists()
    assert "5 done, 1 failed" in shown
    assert "broken.png" in shown
    assert shown.count("--onnx") == 1
    assert sorted(path.name for path in data.iterdir() if path.suffix not in (".png", ".bmp", ".txt")) == []

    before = state(data)
    again = run(here, "--onnx", "--batch_size", 2, "--append_tags", "--remove_underscore", "--strict", "../train_data")
    assert again.returncode == 1, told(again)  # --strict: one image is broken
    assert "--onnx" not in told(again)
    assert state(data) == before

    (data / "a.txt").write_bytes("\ufeffmine, smile\r\n".encode())
    (data / "e.txt").unlink()
    left = run(here, "--skip_existing", "--max_data_loader_n_workers", 2, "../train_data")
    assert left.returncode == 0, told(left)
    assert "1 done, 4 skipped, 1 failed" in told(left)
    assert (data / "a.txt").read_bytes() == "\ufeffmine, smile\r\n".encode()
    assert text_of(data / "e.png") == ", ".join(expected[data / "e.png"]) + "\n"

    more = run(here, "--append_tags", "--max_data_loader_n_workers", 0, "../train_data")
    assert more.returncode == 0, told(more)
    new = [tag for tag in expected[data / "a.png"] if tag != "smile"]
    assert (data / "a.txt").read_text(encoding="utf-8") == ", ".join(["mine", "smile", *new]) + "\n"


@pytest.mark.rows("R71", "R72", "R73", "R77")
def test_a_tagger_is_fetched_once_and_again_when_asked(tmp_path):
    """A v3 repository: its ONNX model and labels, and nothing else of what lies there."""
    seen = write_image(tmp_path / "data" / "a.png", 11)
    repo, kept_in = "SmilingWolf/wd-vit-tagger-v3", tmp_path / "wd14_tagger_model"
    folder = kept_in / "SmilingWolf_wd-vit-tagger-v3"
    arguments = ("--onnx", "--repo_id", repo, "data")

    def at_hub(seed: int) -> dict[str, bytes]:
        write_model(tmp_path / "origin", seed)
        names = ("model.onnx", "selected_tags.csv")
        return {**{name: (tmp_path / "origin" / name).read_bytes() for name in names}, "model.safetensors": b"0" * 9}

    with running_hub() as hub:
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        hub.kinds[repo], hub.files[repo] = "models", at_hub(1)
        first = run(tmp_path, *arguments, **online)
        assert first.returncode == 0, told(first)
        assert {path.name for path in folder.iterdir() if path.is_file()} == {"model.onnx", "selected_tags.csv"}
        assert text_of(tmp_path / "data" / "a.png") == ", ".join(expected_tags(seen, 1)) + "\n"

        hub.files[repo] = at_hub(2)
        assert expected_tags(seen, 1) != expected_tags(seen, 2)
        kept = run(tmp_path, *arguments, **online)
        assert kept.returncode == 0, told(kept)
        assert text_of(tmp_path / "data" / "a.png") == ", ".join(expected_tags(seen, 1)) + "\n"
        forced = run(tmp_path, *arguments, "--force_download", **online)
        assert forced.returncode == 0, told(forced)
        assert text_of(tmp_path / "data" / "a.png") == ", ".join(expected_tags(seen, 2)) + "\n"

        hub.kinds["me/keras"], hub.files["me/keras"] = "models", {"saved_model.pb": b"0", "selected_tags.csv": b"0"}
        refused = run(tmp_path, "--repo_id", "me/keras", "data", **online)
        assert refused.returncode == 2
        assert "me/keras at Hugging Face has only a Keras model" in told(refused)

    kept_in.rename(tmp_path / "models")
    offline = run(tmp_path, *arguments, "--model_dir", "models")
    assert offline.returncode == 0, told(offline)


@pytest.mark.rows("R81", "R84", "R85", "R86")
def test_one_json_file_of_two_processes(run_script, tmp_path):
    """Sub-folders, counts, one broken image; and each image once, in the order of the folder."""
    write_model(tmp_path / "tagger", 3, batch=2)
    data = tmp_path / "data"
    names = ["1.png", "2.png", "3.png", "sub/1.png", "sub/4.png"]
    seen = {name: write_image(data / name, seed, 8 if seed % 2 else 4) for seed, name in enumerate(names)}
    (data / "zero.jpg").write_bytes(b"")
    options = ("--repo_id=tagger", "--onnx", "--recursive", "--frequency_tags", "--remove_underscore", "data")
    edits = (
        "--undesired_tags=smile",
        "--tag_replacement=red hat,cap",
        "--always_first_tags=1girl",
        "--use_rating_tags_as_last_tag",
    )
    done = run_script(SCRIPT, *options, *edits, "--output_path=out/tags.jsonl", folder=tmp_path, processes=2)
    shown = told(done)
    assert done.returncode == 0, shown[-3000:]
    assert "5 done, 1 failed" in shown

    def edited(pixels: np.ndarray) -> list[str]:
        tags = [tag for tag in expected_tags(pixels, 3) if tag != "smile"]
        tags = [tag if tag == "^_^" else tag.replace("_", " ").replace("red hat", "cap") for tag in tags]
        return [*sorted(tags, key=lambda tag: tag != "1girl"), RATINGS[answers(pixels, 3)[:4].argmax()]]

    tags = {name: edited(pixels) for name, pixels in seen.items()}
    sizes = {name: [16, 8 if number % 2 == 0 else 16] for number, name in enumerate(names)}
    lines = (tmp_path / "out" / "tags.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"image_path": str(data / name), "caption": ", ".join(tags[name]), "image_size": sizes[name]} for name in names
    ]
    counts = Counter(tag for found in tags.values() for tag in found)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    assert [line for line in done.stdout.splitlines() if ": " in line] == [f"{tag}: {count}" for tag, count in ordered]
    assert not list(data.rglob("*.txt"))


def test_a_json_file_grows(tmp_path):
    """--skip_existing keeps what is there and adds what is new; what others wrote stays."""
    write_model(tmp_path / "tagger")
    data, out = tmp_path / "data", tmp_path / "tags.json"
    first, second = (write_image(data / name, seed) for seed, name in enumerate(["a.png", "b.png"]))
    there = {str(data / "a.png"): {"caption": "mine", "tags": "own"}, "elsewhere.png": {"tags": "x"}}
    out.write_text(json.dumps(there), encoding="utf-8")
    common = ("--repo_id=tagger", "--output_path=tags.json", "data")
    skipped = run(tmp_path, *common, "--skip_existing", "--debug")
    assert skipped.returncode == 0, told(skipped)
    new = {"tags": ", ".join(expected_tags(second)), "image_size": [16, 16]}
    assert json.loads(out.read_text(encoding="utf-8")) == {**there, str(data / "b.png"): new}
    assert f"{Path('data') / 'b.png'}: {new['tags']}" in skipped.stdout
    assert "  rating: " in skipped.stdout

    whole = run(tmp_path, *common)
    assert whole.returncode == 0, told(whole)
    tags = {str(data / "a.png"): first, str(data / "b.png"): second}
    assert json.loads(out.read_text(encoding="utf-8")) == {
        path: {"tags": ", ".join(expected_tags(pixels)), "image_size": [16, 16]} for path, pixels in tags.items()
    }
