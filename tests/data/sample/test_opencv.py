"""An OpenCV that cannot be imported is one line with the command that mends it, before anything large is read."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest

from library import cli
from library.data.sample.opencv import opencv
from library.errors import UserError
from library.preparation.images import edges, faces, resizing
from library.preparation.latents import buckets, caching
from library.preparation.tagging import tag_images as tagging

REPLACEMENT = f"-m pip install --force-reinstall --no-deps opencv-python-headless=={metadata.version('opencv-python')}"


@pytest.fixture
def without_opencv(monkeypatch):
    opencv.cache_clear()
    monkeypatch.setitem(sys.modules, "cv2", None)
    yield
    opencv.cache_clear()


def test_the_command_puts_the_same_version_in_place(without_opencv):
    with pytest.raises(UserError, match="OpenCV cannot be imported") as caught:
        opencv()
    assert str(caught.value).endswith(REPLACEMENT)


def test_a_training_says_so_before_data_and_model(without_opencv, monkeypatch, capsys):
    monkeypatch.setattr("library.data.load.read_data", lambda *_: pytest.fail("read the data"))
    line = ["--pretrained_model_name_or_path=examples/tiny_model/tiny-sd.safetensors", "--network_module=networks.lora"]
    line += ["--train_data_dir=examples/concept", "--output_dir=out", "--resolution=64", "--max_train_steps=1"]
    with pytest.raises(SystemExit) as ended:
        cli.run("sd", "network", line)
    assert ended.value.code == 2
    assert REPLACEMENT in capsys.readouterr().err


@pytest.mark.parametrize(
    "work",
    [
        buckets.prepare,
        caching.cache_latents,
        edges.draw_edges,
        faces.cut_faces,
        resizing.resize_images,
        tagging.tag_images,
    ],
)
def test_so_do_the_scripts_that_change_images(without_opencv, work):
    with pytest.raises(UserError, match="opencv-python-headless"):
        work(None)
