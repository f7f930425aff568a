"""Runs the scripts as a user does: subprocesses, from the repository root, with the network shut off."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = "examples/tiny_model/tiny-sd.safetensors"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess]:
    def run(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *launcher, *arguments],
            cwd=ROOT,
            env={**os.environ, **OFFLINE},
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )

    return run


@pytest.fixture(scope="session")
def train_arguments() -> Callable[..., list[str]]:
    """A short, complete command line of train_network.py; keywords add options, None removes one, True is a flag."""

    def arguments(output_dir: Path, **changes: object) -> list[str]:
        options: dict[str, object] = {
            "pretrained_model_name_or_path": MODEL,
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
        line = ["train_network.py"]
        for name, value in options.items():
            if value is True:
                line.append(f"--{name}")
            elif isinstance(value, list):
                line += [f"--{name}", *map(str, value)]
            elif value is not None:
                line.append(f"--{name}={value}")
        return line

    return arguments
