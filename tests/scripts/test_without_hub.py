"""Single files of FLUX.1 and Stable Diffusion 3 train with an empty cache and a hub that does not answer."""

from __future__ import annotations

import socket

import pytest
from PIL import Image

from tests.builders.flux import write_flux, write_part_files
from tests.builders.sd3 import write_encoder_file, write_tiny_sd3
from tests.scripts.starting import as_words

T5_VOCABULARY = 32128


def _flux(folder) -> dict[str, object]:
    parts = write_part_files(folder, T5_VOCABULARY)
    return {"pretrained_model_name_or_path": write_flux(folder), **parts, "network_module": "networks.lora_flux"}


def _sd3(folder) -> dict[str, object]:
    flags = {"clip_l": "te1", "clip_g": "te2", "t5xxl": "te3"}
    parts = {
        flag: write_encoder_file(folder / f"{flag}.safetensors", part, vocabulary=T5_VOCABULARY)
        for flag, part in flags.items()
    }
    model = write_tiny_sd3(folder / "sd3.safetensors")
    return {"pretrained_model_name_or_path": model, **parts, "network_module": "networks.lora_sd3"}


@pytest.fixture(scope="module")
def hub():
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


@pytest.fixture(scope="module")
def variables(hub, tmp_path_factory):
    """An environment with an empty cache and the hub's address."""
    endpoint = f"http://127.0.0.1:{hub.getsockname()[1]}"
    online = {"HF_HUB_OFFLINE": None, "HTTP_PROXY": None, "HTTPS_PROXY": None, "HF_ENDPOINT": endpoint}
    return {**online, "HF_HOME": str(tmp_path_factory.mktemp("empty")), "HF_HUB_ETAG_TIMEOUT": "1"}


@pytest.mark.parametrize(("family", "write"), [("flux", _flux), ("sd3", _sd3)])
def test_trains_without_asking_the_hub(run_script, tmp_path, hub, variables, family, write):
    images = tmp_path / "train" / "1_a photo of a cat"
    images.mkdir(parents=True)
    Image.new("RGB", (64, 64), (200, 90, 120)).save(images / "cat.png")
    options = {
        **write(tmp_path),
        "train_data_dir": tmp_path / "train",
        "output_dir": tmp_path / "out",
        "output_name": "lora",
        "resolution": 64,
        "max_train_steps": 1,
        "network_dim": 2,
        "network_train_unet_only": True,
        "learning_rate": 1e-3,
        "max_data_loader_n_workers": 0,
    }
    done = run_script(f"{family}_train_network.py", *as_words(options), variables=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "lora.safetensors").is_file()
    with pytest.raises(BlockingIOError):  # nobody has connected
        hub.accept()
