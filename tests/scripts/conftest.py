"""Runs the scripts as a user does: in processes of their own, from the repository root, with the network shut off."""

from __future__ import annotations

import os
import random
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.scripts.starting import Started, Starter, as_words

MODEL = "examples/tiny_model/tiny-sd.safetensors"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # sums in the same order in one process and in several; and less work


@pytest.fixture(scope="session")
def start_script(tmp_path_factory) -> Iterator[Callable[..., Started]]:
    """Starts a script. One at a time: what it wrote is there until the next one is started.

    `processes`: as many that train together, as if torch's launcher had started them. `launcher`: words between Python
    and the script. `variables`: of the environment; None takes one away.
    """
    starter = Starter(tmp_path_factory.mktemp("scripts"))

    def start(
        *arguments: str | Path,
        launcher: tuple[str, ...] = (),
        processes: int = 1,
        variables: Mapping[str, str | None] | None = None,
    ) -> Started:
        line = [os.fspath(argument) for argument in arguments]
        all_variables = {**os.environ, **OFFLINE, **ONE_THREAD, **(variables or {})}
        environment = {name: value for name, value in all_variables.items() if value is not None}
        return starter.start(line, [{**environment, **place} for place in _places(processes)], launcher=launcher)

    yield start
    starter.end()


@pytest.fixture(scope="session")
def run_script(start_script) -> Callable[..., subprocess.CompletedProcess]:
    """Starts a script, see `start_script`, and waits for its end."""

    def run(*arguments: str | Path, **how: object) -> subprocess.CompletedProcess:
        return start_script(*arguments, **how).result()

    return run


def _places(processes: int) -> list[dict[str, str]]:
    """What torch's launcher tells each of several processes."""
    if processes == 1:
        return [{}]
    port = _free_port()
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranked = [{**common, "RANK": number, "LOCAL_RANK": number} for number in range(processes)]
    return [{name: str(value) for name, value in place.items()} for place in ranked]


def _free_port() -> int:
    """A port on which nothing listens, below those that systems hand out to whoever connects in the meantime."""
    while True:
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


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
