"""A method decides how the prediction is computed: steps, validation and sample images all follow it."""

from __future__ import annotations

import dataclasses

import numpy
import pytest
from PIL import Image

from library import cli, registry
from library.methods.network import NetworkMethod
from library.training.tracking import Tracker
from tests.scripts.conftest import MODEL
from tests.scripts.starting import ROOT

LINE = (
    *("--train_data_dir=examples/concept", "--output_name=lora", "--resolution=64", "--seed=1", "--cache_latents"),
    *("--network_module=networks.lora", "--network_dim=2", "--network_train_unet_only", "--max_train_steps=1"),
    *("--validation_split=0.2", "--validate_every_n_steps=1", "--max_validation_steps=1"),
    *("--sample_every_n_steps=1", "--max_data_loader_n_workers=0"),
)


def shifted_by(shift: float):
    """A network method whose prediction is `shift` above the denoiser's."""

    class Shifted(NetworkMethod):
        def denoise(self, family, models):
            predict = super().denoise(family, models)
            return lambda noisy, timesteps, cond, batch: predict(noisy, timesteps, cond, batch) + shift

    return Shifted


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Trains one step; returns the training loss, the validation loss and the sample image."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "prompts.txt").write_text("a house --w 64 --h 64 --s 2 --d 3\n")

    def run(shift: float):
        logged: dict[str, float] = {}
        spec = dataclasses.replace(registry.METHODS["network"], method=shifted_by(shift))
        monkeypatch.setitem(registry.METHODS, "network", spec)
        monkeypatch.setattr(Tracker, "scalars", lambda self, step, values: logged.update(values))
        out = tmp_path / str(shift)
        files = (f"--pretrained_model_name_or_path={MODEL}", f"--output_dir={out}")
        cli.run("sd", "network", [*files, f"--sample_prompts={tmp_path / 'prompts.txt'}", *LINE])
        (image,) = (out / "sample").glob("*.png")
        with Image.open(image) as opened:
            return logged["loss/current"], logged["loss/validation"], numpy.asarray(opened).astype(int)

    return run


def test_steps_validation_and_samples_share_the_methods_prediction(train):
    loss, validation_loss, image = train(0.0)
    shifted_loss, shifted_validation_loss, shifted_image = train(10.0)
    # mean((p + 10 - t)^2) = mean((p - t)^2) + 20 mean(p - t) + 100, and predictions are a few units at most.
    assert 50 < shifted_loss - loss < 150
    assert 50 < shifted_validation_loss - validation_loss < 150
    assert abs(shifted_image - image).mean() > 20
