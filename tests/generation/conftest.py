from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from library.generation.script import ALL_FAMILIES
from library.options.base import Options
from tests.builders import write_tiny_sd1
from tests.builders.options import options_with


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion 1.x with random weights."""
    return write_tiny_sd1(tmp_path_factory.mktemp("model") / "tiny-sd.safetensors")


@pytest.fixture
def options() -> Callable[..., Options]:
    """The options of gen_img.py."""

    def make(**values) -> Options:
        return options_with(*ALL_FAMILIES, **values)

    return make


@pytest.fixture
def image(tmp_path) -> Path:
    Image.linear_gradient("L").resize((100, 70)).convert("RGB").save(tmp_path / "from.png")
    return tmp_path / "from.png"
