"""Networks of other types than LoRA learn: after a few steps the bundled model predicts the concept's noise better.

`python benchmarks/learning.py` trains every type for longer and looks at what the model then draws.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import images as pic
import measure
import numpy as np
import pytest
import torch
from PIL import Image

from library import cli
from library.methods.network import NetworkMethod
from library.runtime import seeds
from library.training.step import StepParts, training_step
from library.types import Batch

CONCEPT = Path(__file__).resolve().parents[2] / "examples" / "concept"
STEPS = 12
TYPES = {
    "lokr": (["--network_module=networks.lokr", "--network_args", "factor=4"], 1e-2),
    "diag-oft": (["--network_module=networks.lycoris", "--network_args", "algo=diag-oft", "preset=attn-mlp"], 1e-2),
}


@torch.no_grad()
def concept_batch(family, models) -> Batch:
    """Eight images of the concept, encoded."""
    files = sorted(CONCEPT.glob("*/*.png"))[:8]
    images = (Image.open(file).convert("RGB").resize((pic.SIZE, pic.SIZE)) for file in files)
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images])
    latents = family.latents.encode(models, pixels.movedim(-1, 1) / 127.5 - 1, torch.Generator().manual_seed(0))
    sizes = torch.full((len(files), 2), pic.SIZE)
    return Batch(
        captions=[""] * len(files),
        latents=latents,
        pixels=None,
        loss_weights=torch.ones(len(files)),
        masks=None,
        original_sizes=sizes,
        crop_top_lefts=torch.zeros_like(sizes),
        target_sizes=sizes,
        text=family.text.encode(models, ["a large sks flower"] * len(files)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_the_loss_on_the_concept_falls(name):
    given, rate = TYPES[name]
    model = ["--pretrained_model_name_or_path", str(measure.MODEL), "--network_dim=16", "--network_train_unet_only"]
    family, models = cli.load_family("sd", [*model, *given, f"--learning_rate={rate}", "--seed=1"])
    method = NetworkMethod(family.opts)
    method.attach(family, models)
    batch = concept_batch(family, models)
    predict = partial(family.denoiser.predict, models)
    parts = StepParts(family, models, predict, family.denoiser.objective(), grad_text=False)

    def loss(purpose, number):
        return training_step(parts, batch, seeds.generator("cpu", 1, purpose, number)).losses.mean()

    @torch.no_grad()
    def measured():
        return sum(float(loss("measured", number)) for number in range(3)) / 3

    before = measured()
    optimizer = torch.optim.AdamW(method.parameter_groups())
    method.trainable().train()
    for number in range(STEPS):
        loss("trained", number).backward()
        method.before_step()
        optimizer.step()
        optimizer.zero_grad()
    method.trainable().eval()
    after = measured()
    print(f"loss on the concept: {before:.4f} before, {after:.4f} after")
    assert after < 0.8 * before
