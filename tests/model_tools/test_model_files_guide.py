"""The recipes of docs/model_tools.md about model files run as they are printed."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from library.families.sd.saving import save_model
from tests.builders import tiny_sd
from tests.builders.flux import write_transformer_folder
from tests.builders.networks import TYPES, write_network
from tests.builders.sd3 import mmdit_tensors, tiny_vae, write_encoder_file
from tests.builders.upscaler import write_upscaler
from tests.test_docs import blocks

ROOT = Path(__file__).resolve().parents[2]
MINE = (
    "Merging models",
    "SD 1.x and 2.x: files and Diffusers folders",
    "FLUX.1 from Diffusers",
    "SD3 and 3.5 in one file",
    "Verifying network files",
    "Network files on diffusers' pipelines",
    "Upscaling images as latents",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tiny files by the names that the guide has for them."""
    place = tmp_path_factory.mktemp("guide")
    for seed, name in enumerate(("first", "second", "third")):
        models = tiny_sd(seed=seed)
        save_model(models, place / f"{name}.safetensors", save_as="safetensors", dtype=None, metadata={})
    write_network(models, place / "flower.safetensors", TYPES["lora"])
    write_network(models, place / "style.safetensors", TYPES["lokr"])
    write_transformer_folder(place / "flux_diffusers", "schnell")
    save_file(mmdit_tensors(), place / "mmdit.safetensors")
    save_file(tiny_vae().state_dict(), place / "sd3_vae.safetensors")
    for name, part in (("clip_l", "te1"), ("clip_g", "te2"), ("t5xxl", "te3")):
        write_encoder_file(place / f"{name}.safetensors", part)
    write_upscaler(place / "upscaler")
    (place / "images").mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(place / "images" / "a.png")
    return place


def make_images_small(config: Path) -> None:
    """A Diffusers folder says how large its images are; what is made from a file has 512 pixels."""
    if config.is_file():
        config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 8}))


def test_the_recipes_run_as_printed(folder, monkeypatch):
    monkeypatch.chdir(folder)
    texts = [text.replace("\\\n", " ") for heading, text in blocks("model_tools.md", "") if heading in MINE]
    lines = [line for text in texts for line in text.splitlines()]
    assert len(lines) == 10
    for line in lines:
        python, script, *words = shlex.split(line)
        assert python == "python"
        monkeypatch.setattr(sys, "argv", [script, *words])
        runpy.run_path(str(ROOT / script), run_name="__main__")  # raises SystemExit where something is wrong
        make_images_small(folder / "first_diffusers" / "unet" / "config.json")
    for name in ("merged", "sum", "again", "flux1", "sd3_bundle"):
        assert load_file(folder / f"{name}.safetensors")
    for name in ("flower.png", "flower.json", "flower_image.png", "upscaled/a.png"):
        assert (folder / name).is_file()
    ((_, code),) = [block for block in blocks("model_tools.md", "python") if block[0] in MINE]
    names: dict = {}
    exec(compile(code, "the guide", "exec"), names)
    assert names["image"].size == (64, 64)
