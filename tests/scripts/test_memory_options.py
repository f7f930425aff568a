"""Short runs with the options that trade memory, precision and speed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.checkpoints.reading import read_metadata

pytestmark = pytest.mark.slow


def run(run_script, arguments) -> str:
    done = run_script(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


@pytest.mark.rows("R182")
def test_bf16_throughout_and_steps_inside_the_backward_pass(tmp_path: Path, run_script, train_arguments):
    more = {"mixed_precision": "bf16", "full_bf16": True, "stochastic_rounding": True, "fused_backward_pass": True}
    log = run(run_script, train_arguments(tmp_path, max_train_steps=2, **more))
    assert "--max_grad_norm: not applied with --fused_backward_pass" in log
    weights = load_file(tmp_path / "lora.safetensors")
    assert {value.dtype for name, value in weights.items() if not name.endswith("alpha")} == {torch.bfloat16}
    assert any(bool(value.any()) for name, value in weights.items() if "lora_up" in name), "nothing was learned"


def test_a_base_in_8_bits_with_compiled_blocks(tmp_path: Path, run_script, train_arguments):
    more = {"mixed_precision": "bf16", "fp8_base": True, "torch_compile": True, "dynamo_backend": "eager"}
    more |= {"gradient_checkpointing": True, "cpu_offload_checkpointing": True, "lowram": True}
    log = run(run_script, train_arguments(tmp_path, max_train_steps=2, **more))
    assert "--lowram: has no effect on a CPU" in log
    assert "--cpu_offload_checkpointing: has no effect on a CPU" in log
    weights = load_file(tmp_path / "lora.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_base_in_4_bits(tmp_path: Path, run_script, train_arguments):
    more = {"mixed_precision": "bf16", "quantize_base": "nf4", "gradient_checkpointing": True}
    log = run(run_script, train_arguments(tmp_path, max_train_steps=2, **more))
    for part in ("UNet2DConditionModel", "CLIPTextModel"):
        assert re.search(rf"{part}: the weights of \d+ layers are kept in nf4", log)
    weights = load_file(tmp_path / "lora.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert any(bool(value.any()) for name, value in weights.items() if "lora_up" in name), "nothing was learned"
    assert read_metadata(tmp_path / "lora.safetensors")["ss_quantize_base"] == "nf4"


def test_a_whole_model_in_bf16(tmp_path: Path, run_script, train_arguments):
    arguments = train_arguments(
        tmp_path, max_train_steps=2, network_module=None, network_dim=None, mixed_precision="bf16",
        full_bf16=True, stochastic_rounding=True, save_precision="bf16", save_model_as="safetensors",
    )  # fmt: skip
    run(run_script, ["train_db.py", *arguments[1:]])
    weights = load_file(tmp_path / "lora.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_backend_that_is_not_there_is_reported_in_one_line(tmp_path: Path, run_script, train_arguments):
    done = run_script(*train_arguments(tmp_path, torch_compile=True, dynamo_backend="tensort", max_train_steps=2))
    assert done.returncode == 2
    assert "--dynamo_backend: torch" in done.stderr
    assert "Traceback" not in done.stderr
