"""The models and command lines that the tests of scripts share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scripts.starting import as_words

MODEL = "examples/tiny_model/tiny-sd.safetensors"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A quarter of the bundled model's size, with random weights: for tests that learn nothing and show no images."""
    from tests.builders import write_tiny_sd1

    return write_tiny_sd1(tmp_path_factory.mktemp("model") / "tiny-sd.safetensors")


@pytest.fixture(scope="session")
def train_arguments(small_model) -> Callable[..., list[str]]:
    """A short, complete command line of train_network.py; keywords add options, see `as_words`."""

    def arguments(output_dir: Path, **changes: object) -> list[str]:
        options: dict[str, object] = {
            "pretrained_model_name_or_path": small_model,
            "train_data_dir": "examples/concept",
            "output_dir": output_dir,
            "output_name": "lora",
            "resolution": 64,
            "enable_bucket": True,
            "min_bucket_reso": 64,
            "train_batch_size": 2,
            "max_train_steps": 4,
            "learning_rate": 1e-3,
            "network_module": "networks.lora",
            "network_dim": 4,
            "cache_latents": True,
            "max_data_loader_n_workers": 0,
            "seed": 1,
            **changes,
        }
        return ["train_network.py", *as_words(options)]

    return arguments
