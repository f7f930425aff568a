"""Two processes train as one that accumulates twice as many batches, and only the first one writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tests.scripts.weights import furthest

OPTIONS = {
    "max_train_steps": 4,
    "flip_aug": True,
    "network_dropout": 0.1,
    "caption_dropout_rate": 0.2,
    "validation_split": 0.25,
    "validate_every_n_steps": 2,
    "save_every_n_steps": 2,
    "save_state": True,
    "ddp_timeout": 5,
    "ema": True,
}


def test_two_processes_give_the_same_model_as_one_with_twice_the_batch(run_script, train_arguments, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, processes, more in ((one, 1, {"gradient_accumulation_steps": 2}), (two, 2, {})):
        done = run_script(*train_arguments(folder, **OPTIONS, **more), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("saved the state") == 3
        assert done.stderr.count("validation loss") == 2
    for name in ("lora.safetensors", "lora-step00000002.safetensors", "lora-state/model.safetensors"):
        left, right = load_file(one / name), load_file(two / name)
        assert furthest(left, right) < 1e-6
    assert any(tensor.any() for key, tensor in left.items() if "lora_up" in key)
    with safe_open(two / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_batch_size_per_device"], metadata["ss_total_batch_size"]) == ("2", "4")


@pytest.mark.parametrize("script", ["train_db.py", "fine_tune.py"])
def test_whole_models_too(run_script, small_model, tmp_path, script):
    """Two trained models, the denoiser and the text encoder, in two processes."""
    data = ("--train_data_dir=examples/concept",)
    if script == "fine_tune.py":
        images = Path("examples/concept/10_sks flower")
        entries = {path.stem: {"caption": "a sks flower"} for path in images.glob("*.png")}
        (tmp_path / "meta.json").write_text(json.dumps(entries))
        data = (f"--train_data_dir={images}", f"--in_json={tmp_path / 'meta.json'}", "--train_text_encoder")
    weights = []
    for processes, more in ((1, ("--gradient_accumulation_steps=2",)), (2, ())):
        out = tmp_path / str(processes)
        done = run_script(
            *(script, f"--pretrained_model_name_or_path={small_model}", *data),
            *(f"--output_dir={out}", "--output_name=model", "--resolution=64", "--enable_bucket"),
            *("--min_bucket_reso=64", "--train_batch_size=2", "--max_train_steps=2", "--learning_rate=0.1"),
            *("--optimizer_type=SGD", "--max_data_loader_n_workers=0", "--seed=1", "--cache_latents"),
            "--save_precision=float",
            *more,
            processes=processes,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        weights.append(load_file(out / "model.safetensors"))
    assert furthest(*weights) < 1e-6
    before = load_file(small_model)
    for part in ("model.diffusion_model", "cond_stage_model"):
        keys = [key for key in weights[0] if key.startswith(part)]
        assert max((weights[0][key] - before[key].float()).abs().max().item() for key in keys) > 1e-4


@pytest.mark.parametrize("engine", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_networks_are_not_sharded(run_script, train_arguments, tmp_path, monkeypatch, engine):
    monkeypatch.setenv(engine, "true")
    done = run_script(*train_arguments(tmp_path))
    assert done.returncode == 2
    assert "shards a whole model or a ControlNet; here leave it out" in done.stderr
