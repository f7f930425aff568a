"""Two processes train as one that accumulates twice as many batches, and only the first one writes."""

from __future__ import annotations

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

LAUNCHER = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv-backend=c10d")
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


def test_two_processes_give_the_same_model_as_one_with_twice_the_batch(
    run_script, train_arguments, tmp_path, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in each of two processes: sums in the same order
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, launcher, more in ((one, (), {"gradient_accumulation_steps": 2}), (two, LAUNCHER, {})):
        done = run_script(*train_arguments(folder, **OPTIONS, **more), launcher=launcher)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("saved the state") == 3
        assert done.stderr.count("validation loss") == 2
    for name in ("lora.safetensors", "lora-step00000002.safetensors", "lora-state/model.safetensors"):
        left, right = load_file(one / name), load_file(two / name)
        assert left.keys() == right.keys()
        assert max((left[key] - right[key]).abs().max().item() for key in left) < 1e-6
    assert any(tensor.any() for key, tensor in left.items() if "lora_up" in key)
    with safe_open(two / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_batch_size_per_device"], metadata["ss_total_batch_size"]) == ("2", "4")


@pytest.mark.parametrize("engine", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_engines_that_wrap_the_model_are_refused(run_script, train_arguments, tmp_path, monkeypatch, engine):
    monkeypatch.setenv(engine, "true")
    done = run_script(*train_arguments(tmp_path))
    assert done.returncode == 2
    assert "which is not supported; choose --multi_gpu" in done.stderr
