"""Hypernetworks through train_network.py: trained, resumed, continued, and judged without our code.

What a file does is computed by `tests.builders.hypernetworks`, in diffusers' U-Net, with its noise schedule.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library import cli
from tests.builders.hypernetworks import with_hypernetwork

IMAGES = Path("examples/concept/10_sks flower")
LEARNING = {
    "network_module": "networks.hypernetwork",
    "network_dim": None,
    "network_args": ["activation_func=relu", "dropout=0.1"],
    "learning_rate": 1e-2,
    "lr_scheduler": "constant",
    "train_batch_size": 4,
    "output_name": "hyper",
}


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_script, train_arguments):
    """20 steps with averaged weights, validation, sample images and a state."""
    out = tmp_path_factory.mktemp("hyper")
    (out / "prompts.txt").write_text("a sks flower --w 64 --h 64 --s 2 --d 7", encoding="utf-8")
    options = {
        **LEARNING,
        "max_train_steps": 20,
        "save_every_n_steps": 10,
        "save_state": True,
        "ema": True,
        "validation_split": 0.25,
        "validate_every_n_steps": 10,
        "sample_prompts": out / "prompts.txt",
        "sample_every_n_steps": 20,
        "logging_dir": out / "logs",
    }
    result = run_script(*train_arguments(out, **options))
    assert result.returncode == 0, result.stderr[-3000:]
    return out, options, result


@pytest.mark.rows("R9")
def test_the_file_is_that_of_the_web_ui(trained):
    out, _, result = trained
    assert sorted(path.name for path in out.glob("hyper*.*")) == [
        "hyper-step00000010.pt",
        "hyper-step00000020.pt",
        "hyper.html",
        "hyper.pt",
    ]
    assert "save_model_as" not in result.stderr  # that they are .pt files was no choice of the user's
    with zipfile.ZipFile(out / "hyper.pt") as archive:  # its check refuses files with any other entry
        assert all(re.fullmatch(r"[^/]+/(data/\d+|version|data\.pkl)", name) for name in archive.namelist())
    content = read(out / "hyper.pt")
    assert [key for key in content if isinstance(key, int)] == [64]  # of every attention layer of this small model
    assert (content["step"], content["name"]) == (20, "hyper")
    assert content["sd_checkpoint_name"] == "tiny-sd.safetensors"
    assert len(content["sd_checkpoint"]) == 10
    assert len(list((out / "sample").iterdir())) == 1


def loss(content: dict, models) -> float:
    """Of the training images with fixed noise at four timesteps each; without dropout, in diffusers' classes."""
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    rng = torch.Generator().manual_seed(0)
    images = [Image.open(path).convert("RGB").resize((64, 64)) for path in sorted(IMAGES.glob("*.png"))[:8]]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    tokens = models.tokenizers["te"](["a sks flower"], padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        latents = models.vae.encode(pixels / 127.5 - 1).latent_dist.mean * 0.18215
        text = models.text_encoders["te"](tokens.input_ids).last_hidden_state.expand(len(latents), -1, -1)
        unet, total = with_hypernetwork(models.denoiser, content), 0.0
        for time in (100, 300, 500, 700):
            noise = torch.randn(latents.shape, generator=rng)
            times = torch.full((len(latents),), time)
            predicted = unet(schedule.add_noise(latents, noise, times), times, text).sample
            total += (predicted - noise).square().mean().item()
    return total / 4


@pytest.mark.rows("R9")
def test_it_has_learned(trained, small_model):
    """Seen with seeds 1 to 4: 1.108 without it, 1.020 to 1.103 after 10 steps, 0.985 to 1.078 after 20."""
    out, _, _ = trained
    _, models = cli.load_family("sd", [f"--pretrained_model_name_or_path={small_model}"])
    contents = {}, read(out / "hyper-step00000010.pt"), read(out / "hyper.pt")
    bare, early, late = (loss(content, models) for content in contents)
    assert late < early < bare
    assert late < 0.985 * bare


def test_a_resumed_run_ends_in_the_same_file(trained, run_script, train_arguments, tmp_path):
    out, options, _ = trained
    state = tmp_path / "state"
    shutil.copytree(out / "hyper-step00000010-state", state)
    result = run_script(*train_arguments(tmp_path / "out", **{**options, "resume": state, "sample_prompts": None}))
    assert result.returncode == 0, result.stderr[-3000:]
    assert sha(tmp_path / "out" / "hyper.pt") == sha(out / "hyper.pt")


def test_it_is_continued(trained, run_script, train_arguments, tmp_path):
    out, _, _ = trained
    given = {**LEARNING, "network_weights": out / "hyper.pt", "network_args": None, "max_train_steps": 1}
    result = run_script(*train_arguments(tmp_path, **{**given, "dim_from_weights": True, "learning_rate": 1e-9}))
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = read(out / "hyper.pt"), read(tmp_path / "hyper.pt")
    for one, other in zip(first[64], second[64], strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-8)
    assert second["activation_func"] == "relu"
