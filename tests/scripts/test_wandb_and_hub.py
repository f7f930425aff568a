"""Runs that log to Weights & Biases, offline, and upload to a hub on this machine; one goes on from a state there."""

from __future__ import annotations

import re

import pytest
from safetensors.torch import load_file

from tests.builders.hub_server import TOKEN, running_hub
from tests.builders.wandb_log import records

pytest.importorskip("wandb")

KEY = "0123456789abcdef0123456789abcdef01234567"
WITH_HUB = {
    "huggingface_repo_id": "me/style",
    "huggingface_path_in_repo": "flowers",
    "huggingface_token": TOKEN,
    "save_state": True,
    "save_state_to_huggingface": True,
    "async_upload": True,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_script, train_arguments):
    """The hub, the folder and what two runs wrote: one of four steps, and one that goes on from its second step."""
    out = tmp_path_factory.mktemp("runs")
    steps = {"save_every_n_steps": 2, "save_last_n_steps": 1, "max_train_steps": 4}
    with running_hub() as hub:
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(out / "home"), "HF_HUB_OFFLINE": "0"}
        variables |= {"NO_PROXY": "127.0.0.1", "WANDB_MODE": "offline"}
        tracked = {"log_with": "wandb", "logging_dir": out / "logs", "wandb_api_key": KEY}
        first = run_script(*train_arguments(out / "first", **WITH_HUB, **steps, **tracked), variables=variables)
        assert first.returncode == 0, first.stderr
        resume = {"resume": "me/style/flowers/lora-step00000002-state:main", "resume_from_huggingface": True}
        command = train_arguments(out / "second", max_train_steps=4, seed=None, **resume)
        second = run_script(*command, variables=variables)
        assert second.returncode == 0, second.stderr
        yield hub, out, first, second


def test_every_save_is_uploaded(runs):
    hub, out, *_ = runs
    files = hub.files["me/style"]
    models = sorted(name for name in files if name.endswith(".safetensors") and "-state/" not in name)
    names = ["lora-step00000002.safetensors", "lora-step00000004.safetensors", "lora.safetensors"]
    assert models == [f"flowers/{name}" for name in names]
    assert files["flowers/lora.safetensors"] == (out / "first" / "lora.safetensors").read_bytes()
    assert not (out / "first" / names[0]).exists(), "deleted here by --save_last_n_steps"
    states = {name.split("/")[1] for name in files if "-state/" in name}
    assert states == {"lora-step00000002-state", "lora-step00000004-state", "lora-state"}


def test_a_state_at_the_hub_goes_on_as_if_nothing_had_been(runs):
    _, out, _, second = runs
    assert "after step 2" in second.stderr
    whole, resumed = (load_file(out / folder / "lora.safetensors") for folder in ("first", "second"))
    assert whole.keys() == resumed.keys()
    assert all(tensor.equal(resumed[name]) for name, tensor in whole.items())


@pytest.mark.rows("R236", "R238")
def test_secrets_and_absolute_paths_are_named_at_the_start(runs):
    _, out, first, second = runs
    lines = first.stderr.splitlines()
    began = next(index for index, line in enumerate(lines) if "loaded" in line)
    for name in ("wandb_api_key", "huggingface_token"):
        assert [line for line in lines[:began] if re.search(rf"WARNING +--{name}: others can see it", line)]
    assert [line for line in lines[:began] if re.search(r"INFO +--logging_dir, --output_dir.*: absolute paths", line)]
    assert "absolute paths" not in second.stderr
    written = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes() or TOKEN.encode() in path.read_bytes()]


def test_the_run_at_wandb_is_there(runs):
    _, out, *_ = runs
    (run,) = (out / "logs" / "wandb").glob("offline-run-*")
    (log,) = run.glob("*.wandb")
    content = log.read_bytes()
    for name in (b"network_train", b"loss/current", b"loss/average", b"lr/unet", b"norm/gradient"):
        assert name in content
    (named,) = [record.run for record in records(log) if record.HasField("run")]
    assert named.display_name == "lora", "by --output_name"
    assert [path.name for path in (out / "logs").iterdir()] == ["wandb"], "no TensorBoard logs"
