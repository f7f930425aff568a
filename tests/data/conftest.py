"""Options and images for the data tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.options.data import DataOptions
from library.options.loss import LossOptions
from library.options.sampling import ValidationOptions
from library.options.training import TrainingOptions
from library.types import FamilyTraits
from tests.builders.options import options_with

TRAITS = FamilyTraits(
    label="Test family",
    text_encoders=("te",),
    latent_channels=4,
    pixel_multiple=8,
    bucket_step=64,
    objective="ddpm",
    cache_suffix="_test.npz",
    default_resolution=512,
    sample_steps=1,
    sample_scale=1.0,
    inpaints=True,
)


@pytest.fixture
def traits() -> FamilyTraits:
    return TRAITS


@pytest.fixture
def make_opts():
    """Real options: the defaults, and what a test gives. Without workers, unless a test is about them."""

    def make(**given):
        given = {"max_data_loader_n_workers": 0, **given}
        if "dataset_config" in given:
            given["dataset_config"] = Path(given["dataset_config"])
        groups = (DataOptions, LossOptions, TrainingOptions, ValidationOptions)
        return options_with(*groups, **given)

    return make


@pytest.fixture
def draw():
    """Writes an image of random pixels, different for every name, and its caption where one is given."""

    def write(path: Path, size=(64, 64), caption: str | None = None, extension: str = ".caption") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(list(path.name.encode())).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(path)
        if caption is not None:
            path.with_suffix(extension).write_text(caption, encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_config(tmp_path):
    """Writes a dataset config: TOML text, or a dict as JSON."""

    def write(content, name: str | None = None) -> str:
        path = tmp_path / (name or ("data.json" if isinstance(content, dict) else "data.toml"))
        path.write_text(json.dumps(content) if isinstance(content, dict) else content, encoding="utf-8")
        return str(path)

    return write
