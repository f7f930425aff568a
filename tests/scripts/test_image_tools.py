"""The image tools as a user starts them: from the repository, and from inside tools/."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.builders import face_models as build

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    """Always a fresh process: what these scripts do not import is a part of what is tested."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def in_tools(*arguments: str) -> subprocess.CompletedProcess:
    return run(*arguments, folder=ROOT / "tools")


@pytest.fixture
def images(tmp_path):
    """Two images with a caption each, and a file that is none."""
    folder = tmp_path / "my images"
    folder.mkdir()
    for name in ("a.png", "b.jpg"):
        pixels = np.full((320, 640, 3), 200, np.uint8)
        pixels[128:192, 192:256] = build.FACE
        Image.fromarray(pixels).save(folder / name, quality=100)
        (folder / name).with_suffix(".txt").write_text(name)
    (folder / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def test_resizing(images, tmp_path):
    line = ["tools/resize_images_to_resolution.py", str(images), str(tmp_path / "out"), "--copy_associated_files"]
    line += ["--max_resolution", "256x256,128x128", "--divisible_by", "8"]
    done = run(*line)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"{n}+{s}.{e}" for n in "ab" for s in ("128x128", "256x256") for e in ("jpg", "txt")]
    assert Image.open(tmp_path / "out" / "a+256x256.jpg").size == (360, 176)
    assert "2 done, 1 failed" in done.stderr
    assert "c.png" in done.stderr
    assert "Traceback" not in done.stderr
    assert run(*line, "--strict", "--skip_existing").returncode == 1


def test_faces(images, tmp_path):
    build.write_yolo8(tmp_path / "model.onnx")
    line = [
        "detect_face_rotate.py",
        "--src_dir",
        str(images),
        "--dst_dir",
        str(tmp_path / "out"),
        "--crop_size=128,128",
    ]
    refused = in_tools(*line)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --model is required")
    done = in_tools(*line, f"--model={tmp_path / 'model.onnx'}")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a_0064_0064_0064_0064.png", "b_0064_0064_0064_0064.jpg"]
    assert "onnxruntime" not in done.stderr  # that there is no GPU is no news


def test_edges(images, tmp_path):
    done = run("tools/canny.py", "--input", str(images / "a.png"), "--output", str(tmp_path / "edges.png"))
    assert done.returncode == 0, done.stderr
    edges = np.asarray(Image.open(tmp_path / "edges.png"))
    rows, columns = np.nonzero(edges)
    assert (rows.min(), columns.min()) == pytest.approx((128, 192), abs=1)
    assert (rows.max(), columns.max()) == pytest.approx((191, 255), abs=1)
    assert run("tools/canny.py", "--input", str(images / "c.png"), "--output=x.png").returncode == 1


def test_metadata(tmp_path):
    header = json.dumps({"__metadata__": {"ss_b": '{"猫": 1}', "a": "x"}}).encode()
    path = tmp_path / "lora.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    done = in_tools("show_metadata.py", "--model", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == '{\n    "a": "x",\n    "ss_b": "{\\"猫\\": 1}"\n}\n'
    assert done.stderr == ""
    path.write_bytes(b"nothing")
    broken = in_tools("show_metadata.py", "--model", str(path))
    assert broken.returncode == 2
    assert broken.stderr.startswith("error: ")
    assert len(broken.stderr.splitlines()) == 1
    assert in_tools("show_metadata.py").returncode == 2


@pytest.mark.parametrize(
    "script", ["resize_images_to_resolution.py", "detect_face_rotate.py", "canny.py", "show_metadata.py"]
)
def test_help_is_quick(script):
    done = in_tools("-X", "importtime", script, "--help")
    assert done.returncode == 0
    assert "usage: " + script in done.stdout
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "cv2", "onnxruntime", "transformers"}
