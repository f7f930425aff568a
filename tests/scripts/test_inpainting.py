"""--train_inpainting from the outside: with cached latents and sample images, killed and resumed."""

from __future__ import annotations

import time

import pytest
from safetensors import safe_open

from tests.builders import write_tiny_inpainting
from tests.scripts.weights import hash_of

OPTIONS = {
    "train_inpainting": True,
    "max_train_steps": 6,
    "gradient_accumulation_steps": 2,
    "flip_aug": True,
    "max_data_loader_n_workers": 1,
    "save_every_n_steps": 2,
    "save_state": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_inpainting(tmp_path_factory.mktemp("inpainting") / "a.safetensors")


def test_a_killed_run_goes_on_exactly(run_script, start_script, train_arguments, model, tmp_path):
    image = "examples/concept/10_sks flower/flower_00.png"
    (tmp_path / "p.txt").write_text(f"a --w 64 --h 64 --s 1 --d 1 --i {image}\nb --w 64 --h 64 --s 1 --img gone.png\n")
    samples = {"sample_prompts": tmp_path / "p.txt", "sample_at_first": True}
    given = {**OPTIONS, "pretrained_model_name_or_path": model}
    done = run_script(*train_arguments(tmp_path / "whole", **given, **samples))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the sample is drawn without it" in done.stderr
    assert len(list((tmp_path / "whole" / "sample").iterdir())) == 2
    started = start_script(*train_arguments(tmp_path / "killed", **given))
    state = tmp_path / "killed" / "lora-step00000002-state"
    while started.is_running() and not state.is_dir():
        time.sleep(0.02)
    started.kill()
    assert started.result().returncode != 0, "it was over before it could be killed"
    done = run_script(*train_arguments(tmp_path / "killed", **given, resume=state))
    assert done.returncode == 0, done.stderr[-3000:]
    assert hash_of(tmp_path / "killed" / "lora.safetensors") == hash_of(tmp_path / "whole" / "lora.safetensors")
    with safe_open(tmp_path / "killed" / "lora.safetensors", "pt") as file:
        about = file.metadata()
    assert about["ss_train_inpainting"] == "True"
    assert about["modelspec.architecture"] == "stable-diffusion-v1/lora"
