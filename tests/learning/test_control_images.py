"""Networks that read control images must learn to see them: the loss falls on images that they were not trained on.

It does so where such an image comes with its own control image, and not where it comes with that of another.
`python examples/tiny_model/measure_edges.py` looks at what a ControlNet makes of the bundled model's images.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import images as pic
import measure
import measure_edges
import numpy as np
import pytest
import torch
from PIL import Image

from library import cli, registry
from library.families.sdxl.saving import save_model
from library.runtime import seeds
from library.training.step import StepParts, training_step
from library.types import Batch
from tests.builders.options import options_for
from tests.builders.sdxl import tiny_sdxl
from tests.scripts.starting import as_words

TRAINED, HELD_OUT = 48, 16
CAPTION = "a figure"


def drawn(count: int, seed: int, **same: str) -> list[Image.Image]:
    rng = Random(seed)
    return [pic.draw(replace(pic.random_scene(rng), texture="plain", **same), rng) for _ in range(count)]


def edges(image: Image.Image) -> Image.Image:
    return Image.fromarray(measure_edges.edges_of(image)).convert("RGB")


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Random weights in the layout of SDXL, and the VAE of the bundled model, whose latents differ by image."""
    models = tiny_sdxl()
    _, bundled = cli.load_family("sd", [f"--pretrained_model_name_or_path={measure.MODEL}"])
    models.vae = bundled.vae
    path = tmp_path_factory.mktemp("model") / "xl.safetensors"
    save_model(models, path, save_as="safetensors", dtype=None, metadata={})
    return path


@pytest.fixture
def trained(run_script, tmp_path):
    """Runs a script on images and control images; gives the file that it wrote."""

    def run(script: str, images: list[Image.Image], controls: list[Image.Image], **options: object) -> Path:
        for name, files in (("images", images), ("control", controls)):
            (tmp_path / name).mkdir()
            for number, image in enumerate(files):
                image.save(tmp_path / name / f"{number}.png")
                (tmp_path / name / f"{number}.txt").write_text(CAPTION)
        common = {
            "train_data_dir": tmp_path / "images", "conditioning_data_dir": tmp_path / "control",
            "caption_extension": ".txt", "output_dir": tmp_path, "output_name": "net", "resolution": 64,
            "lr_scheduler": "cosine", "cache_latents": True, "max_data_loader_n_workers": 0, "seed": 1,
        }  # fmt: skip
        done = run_script(script, *as_words({**common, **options}))
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / "net.safetensors"

    return run


@torch.no_grad()
def losses(
    family_name: str, method: str, file: Path, images: list[Image.Image], controls: list[Image.Image], **options: object
) -> dict[str, float]:
    """With the same noise each time: without the network, with it, and with others' control images."""
    family = registry.FAMILIES[family_name].adapter(options_for(family_name, method, learning_rate=1.0, **options))
    models = family.loader.load()
    control = family.control if method == "control_net" else family.lllite
    net = control.load(models, str(file))
    pixels, seen = (
        torch.stack([torch.from_numpy(np.array(image)) for image in some]).movedim(-1, 1) / 255
        for some in (images, controls)
    )
    sizes = torch.full((len(images), 2), pic.SIZE)
    batch = Batch(
        captions=[CAPTION] * len(images),
        latents=family.latents.encode(models, pixels * 2 - 1, torch.Generator().manual_seed(0)),
        pixels=None,
        loss_weights=torch.ones(len(images)),
        masks=None,
        original_sizes=sizes,
        crop_top_lefts=torch.zeros_like(sizes),
        target_sizes=sizes,
        text=family.text.encode(models, [CAPTION] * len(images)),
    )
    predict = partial(control.predict, models, net)
    parts = StepParts(family, models, predict, family.denoiser.objective(), grad_text=False)
    found = {}
    for name, given in (("without", None), ("its own", seen), ("another's", seen.roll(1, 0))):
        rng = seeds.generator("cpu", 1)
        found[name] = float(training_step(parts, replace(batch, control=given), rng).losses.mean())
    print("loss by control image:", {name: round(loss, 4) for name, loss in found.items()})
    return found


@pytest.mark.slow
def test_a_controlnet_sees_edges(trained):
    """Of the bundled model's figures, at times when noise hides where they are."""
    images, model = drawn(TRAINED, 1), {"pretrained_model_name_or_path": str(measure.MODEL), "min_timestep": 600}
    more = {"train_batch_size": 8, "max_train_steps": 50, "learning_rate": 1e-3, "debiased_estimation_loss": True}
    file = trained("train_control_net.py", images, [edges(image) for image in images], **model, **more)
    held_out = drawn(HELD_OUT, 2)
    found = losses("sd", "control_net", file, held_out, [edges(image) for image in held_out], **model)
    assert found["its own"] < 0.95 * found["without"]
    assert found["its own"] < 0.95 * found["another's"]


@pytest.mark.slow
def test_a_lllite_sees_its_control_image(trained, large):
    """Images are their own control images; v is predicted from almost nothing but noise, and so it is the image."""
    images = drawn(TRAINED, 1, size="large")
    model = {"pretrained_model_name_or_path": str(large), "v_parameterization": True, "min_timestep": 950}
    more = {"train_batch_size": 4, "max_train_steps": 30, "learning_rate": 3e-2, "cache_text_encoder_outputs": True}
    more |= {"network_dim": 16, "cond_emb_dim": 16}
    file = trained("sdxl_train_control_net_lllite.py", images, images, **model, **more)
    held_out = drawn(HELD_OUT, 2, size="large")
    found = losses("sdxl", "lllite", file, held_out, held_out, **model)
    assert found["its own"] < 0.95 * found["without"]
    assert found["its own"] < 0.95 * found["another's"]
