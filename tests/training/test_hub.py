"""Uploads to a hub that runs on this machine, and states that come from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from library.options.saving import SavingOptions
from library.training.hub import Hub
from tests.builders.hub_server import TOKEN, running_hub

ROOT = Path(__file__).resolve().parents[2]
STATE = ("model.safetensors", "optimizer.bin", "scheduler.bin", "train_state.json")
# The hub's client reads its address when it is imported, so each of these runs in a process of its own.
BEGIN = """
import json, sys
from pathlib import Path
from library.errors import UserError
from library.options.base import Options
from library.options.saving import SavingOptions
from library.runtime import logs
from library.training.hub import Hub, fetch_state

logs.setup_logging(simple=True)
"""


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture
def run(hub, tmp_path):
    """Runs code in `tmp_path`, with a model and a state lying there."""
    (tmp_path / "lora.safetensors").write_bytes(b"weights")
    (tmp_path / "lora-state").mkdir()
    for name in (*STATE, "random_states_0.pkl"):
        (tmp_path / "lora-state" / name).write_text(name)

    def run(code: str, **environment: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        env |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
        command = [sys.executable, "-c", BEGIN + code]
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stderr
        return result

    return run


def test_files_and_folders_go_into_a_new_private_repository(hub, run):
    result = run(f"""
options = SavingOptions(
    huggingface_repo_id="me/style", huggingface_path_in_repo="/flowers/v1/", huggingface_token="{TOKEN}",
    save_state_to_huggingface=True,
)
with Hub(options) as hub:
    hub.upload(Path("lora.safetensors"))
    hub.upload_state(Path("lora-state"))
""")
    assert [(made["organization"], made["name"], made["visibility"]) for made in hub.made] == [
        ("me", "style", "private")
    ]
    assert hub.files["me/style"]["flowers/v1/lora.safetensors"] == b"weights"
    assert {f"flowers/v1/lora-state/{name}" for name in STATE} < hub.files["me/style"].keys()
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert "uploaded lora.safetensors to me/style at Hugging Face" in result.stderr
    assert TOKEN not in result.stdout + result.stderr


def test_a_public_data_set_the_token_of_the_environment_and_no_state(hub, run):
    run(
        """
options = SavingOptions(
    huggingface_repo_id="me/sets", huggingface_repo_type="dataset", huggingface_repo_visibility="public"
)
with Hub(options) as hub:
    hub.upload(Path("lora.safetensors"))
    hub.upload_state(Path("lora-state"))
""",
        HF_TOKEN="hf_of_the_environment",
    )
    assert [(made["type"], made["visibility"]) for made in hub.made] == [("dataset", "public")]
    assert hub.files == {"me/sets": {"lora.safetensors": b"weights"}}
    assert hub.tokens == {"Bearer hf_of_the_environment"}


def test_a_repository_that_is_there_is_used(hub, run):
    hub.files["me/style"], hub.kinds["me/style"] = {"README.md": b"mine"}, "models"
    run("""
with Hub(SavingOptions(huggingface_repo_id="me/style")) as hub:
    hub.upload(Path("lora.safetensors"))
""")
    assert hub.files["me/style"] == {"README.md": b"mine", "lora.safetensors": b"weights"}


def test_an_upload_that_fails_is_a_warning(hub, run):
    hub.fail = 403
    result = run("""
with Hub(SavingOptions(huggingface_repo_id="me/style")) as hub:
    hub.upload(Path("lora.safetensors"))
    hub.upload(Path("not there"))
print("the run goes on")
""")
    assert result.stdout == "the run goes on\n"
    first, second = result.stderr.splitlines()
    assert first.startswith("upload to Hugging Face failed: lora.safetensors: ")
    assert second.startswith("upload to Hugging Face failed: not there: ")
    assert "Traceback" not in result.stderr


def test_a_hub_out_of_reach_is_a_warning(run):
    result = run(
        """
with Hub(SavingOptions(huggingface_repo_id="me/style", async_upload=True)) as hub:
    hub.upload(Path("lora.safetensors"))
print("the run goes on")
""",
        HF_HUB_OFFLINE="1",
    )
    assert result.stdout == "the run goes on\n"
    assert result.stderr.count("upload to Hugging Face failed") == 2  # making the repository, and the upload
    assert "Traceback" not in result.stderr


def test_async_uploads_wait_for_nobody_until_the_file_changes(hub, run):
    hub.gate = threading.Event()
    run("""
import os, urllib.request

with Hub(SavingOptions(huggingface_repo_id="me/style", async_upload=True)) as hub:
    for number in range(3):
        Path(f"{number}.safetensors").write_text(str(number))
        hub.upload(Path(f"{number}.safetensors"))
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/release")
    hub.settle(Path("0.safetensors"))
    Path("0.safetensors").unlink()
    hub.settle(Path("never uploaded"))
""")
    assert hub.files["me/style"] == {f"{number}.safetensors": str(number).encode() for number in range(3)}
    assert hub.commits == [[f"{number}.safetensors"] for number in range(3)]


@pytest.mark.parametrize("options", [SavingOptions(), SavingOptions(async_upload=True)])
def test_without_a_repository_nothing_happens(options, tmp_path):
    with Hub(options) as hub:
        hub.upload(tmp_path / "not there")
        hub.settle(tmp_path / "not there")


FETCH = """
def fetch(resume):
    try:
        opts = fetch_state(Options([SavingOptions(resume=resume, resume_from_huggingface=True)]))
    except UserError as error:
        return error.problems[0]
    assert not opts.saving.resume_from_huggingface
    return sorted(path.name for path in Path(opts.saving.resume).iterdir())

print(json.dumps([fetch(resume) for resume in json.loads(WANTED)]))
"""


def test_states_are_fetched_without_pickles(hub, run):
    content = {f"runs/a[1]/lora-state/{name}": b"x" for name in (*STATE, "random_states_0.pkl")}
    hub.files["me/style"], hub.kinds["me/style"] = content, "models"
    hub.files["me/sets"], hub.kinds["me/sets"] = {"s/optimizer.bin": b"x"}, "datasets"
    wanted = [
        "me/style/runs/a[1]/lora-state",
        "me/style/runs/a[1]/lora-state:main",
        "me/sets/s:main:dataset",
        "me/style/runs/b",
        "me/style/runs/a[1]/lora-state:v2",
        "me/nothing/s",
    ]
    result = run(f"WANTED = {json.dumps(json.dumps(wanted))}" + FETCH)
    good, with_revision, of_set, no_folder, no_revision, no_repository = json.loads(result.stdout)
    assert good == with_revision == sorted(STATE)
    assert of_set == ["optimizer.bin"]
    assert no_folder == "--resume: there is no state runs/b in me/style at Hugging Face"
    assert no_revision.startswith("--resume: me/style/runs/a[1]/lora-state:v2 cannot be downloaded: ")
    assert no_repository.startswith("--resume: me/nothing/s cannot be downloaded: ")


def test_a_state_without_the_network(run):
    result = run("WANTED = '[\"me/style/s\"]'" + FETCH, HF_HUB_OFFLINE="1")
    assert json.loads(result.stdout)[0].startswith("--resume: me/style/s cannot be downloaded: ")
