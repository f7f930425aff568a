"""The demo's LoRA must measurably learn the concept, and must leave what the model knew alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import images as pic
import measure
import pytest
import torch

import quickstart
from library import cli
from library.methods.network import NetworkMethod

ROOT = Path(__file__).resolve().parents[2]
COUNT = 24


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """Trained by the very command that quickstart.py runs, without its sample images."""
    out = tmp_path_factory.mktemp("concept")
    command = [a for a in quickstart.training() if not a.startswith(("--output_dir", "--sample", "--logging"))]
    command += [f"--output_dir={out}", "--max_data_loader_n_workers=0"]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return out / "sks_flower.safetensors"


@torch.no_grad()
def shown(network: Path | None, texts: list[str]) -> list[pic.Reading]:
    arguments = [f"--pretrained_model_name_or_path={measure.MODEL}", "--network_module=networks.lora"]
    if network is not None:
        arguments += [f"--network_weights={network}", "--dim_from_weights"]
    family, models = cli.load_family("sd", arguments)
    if network is not None:
        method = NetworkMethod(family.opts)
        method.attach(family, models)
        method.trainable().eval()
    return [pic.read(image) for image in measure.sample(family, models, texts, 500, steps=20, scale=5.0)]


def concept_texts() -> list[str]:
    names = list(pic.BACKGROUNDS)
    return [f"a large sks flower on a {names[i % len(names)]} background" for i in range(COUNT)]


@pytest.mark.slow
def test_the_concept_is_learned(lora):
    before = sum(reading.concept for reading in shown(None, concept_texts()))
    after = sum(reading.concept for reading in shown(lora, concept_texts()))
    print(f"images that show the concept: {before} of {COUNT} without, {after} of {COUNT} with the LoRA")
    assert before <= COUNT * 0.1
    assert after >= COUNT * 0.8


@pytest.mark.slow
def test_other_prompts_still_work(lora):
    scenes = [("red", "circle"), ("blue", "star"), ("green", "square"), ("yellow", "heart"), ("cyan", "cross")] * 4
    readings = shown(lora, [f"a large {color} {shape} on a black background" for color, shape in scenes])
    right = sum((r.color, r.shape) == scene for r, scene in zip(readings, scenes, strict=True))
    assert right >= len(scenes) * 0.75
