"""What `accelerate launch` and DeepSpeed's options ask for, and what is said against it."""

from __future__ import annotations

import json

import pytest

from library import registry
from library.options.caching import CachedDistribution
from library.options.memory import DistributedOptions
from library.options.parsing import parse_options
from library.options.sharding import Sharding, problems, sharding_of, warnings

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


def options(*words: str, method: str = "finetune"):
    return parse_options(registry.groups_for("flux", method), list(words))


@pytest.mark.parametrize(
    ("words", "environ", "wanted"),
    [
        ((), {}, None),
        ((), {"ACCELERATE_USE_FSDP": "false"}, None),
        ((), FSDP, Sharding("FSDP", reshard=True, offload=False)),
        ((), FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, Sharding("FSDP", reshard=False, offload=False)),
        ((), FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, Sharding("FSDP", reshard=True, offload=True)),
        ((), FSDP | {"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "1"}, Sharding("FSDP", True, False)),
        ((), FSDP | {"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, Sharding("FSDP", False, False)),
        ((), FSDP | {"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "NO_SHARD"}, None),
        ((), DEEPSPEED, Sharding("DeepSpeed", reshard=True, offload=False)),
        ((), DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, None),
        ((), {"ACCELERATE_USE_DEEPSPEED": "true"}, Sharding("DeepSpeed", reshard=False, offload=False)),
        ((), DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, Sharding("DeepSpeed", True, True)),
        (("--deepspeed",), {}, Sharding("--deepspeed", reshard=False, offload=False)),
        (("--deepspeed", "--zero_stage=3"), {}, Sharding("--deepspeed", reshard=True, offload=False)),
        (("--deepspeed", "--zero_stage=0"), {}, None),
        (("--deepspeed", "--offload_optimizer_device=cpu"), DEEPSPEED, Sharding("--deepspeed", False, True)),
        (("--zero_stage=3",), {}, None),
    ],
)
def test_what_is_asked_for(words, environ, wanted):
    assert sharding_of(options(*words), environ) == wanted


@pytest.mark.parametrize(
    ("zero", "wanted"),
    [
        ({"stage": 3, "offload_param": {"device": "cpu"}}, Sharding("DeepSpeed", True, True)),
        ({"stage": "auto", "offload_optimizer": {"device": "none"}}, Sharding("DeepSpeed", False, False)),
        ({}, None),
    ],
)
def test_deepspeeds_own_file(tmp_path, zero, wanted):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": zero, "train_batch_size": "auto"}), encoding="utf-8")
    environ = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    assert sharding_of(options(), environ) == wanted


def test_a_damaged_file_is_one_line(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text("{", encoding="utf-8")
    environ = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    (line,) = problems(options(), environ)
    assert str(file) in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), None),
        (("--mixed_precision=bf16", "--full_bf16", "--gradient_checkpointing"), None),
        (("--mixed_precision=fp16",), "bf16"),
        (("--blocks_to_swap=4",), "--blocks_to_swap"),
        (("--fused_backward_pass",), "--fused_backward_pass"),
        (("--blockwise_fused_optimizers",), "--blockwise_fused_optimizers"),
        (("--torch_compile",), "--torch_compile"),
        (("--lowram",), "--lowram"),
        (("--stochastic_rounding",), "--stochastic_rounding"),
        (("--deepspeed", "--offload_param_device=nvme"), "nvme"),
        (("--deepspeed", "--fp16_master_weights_and_gradients"), "--fp16_master_weights_and_gradients"),
    ],
)
def test_what_does_not_go_together(words, said):
    found = list(problems(options(*words), FSDP))
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_a_network_is_not_sharded():
    (line,) = problems(options("--network_module=networks.lora_flux", method="network"), FSDP)
    assert "--multi_gpu" in line


def test_scripts_that_train_nothing_do_not_care(monkeypatch):
    """accelerate's configuration may be meant for the training that comes after them."""
    for name, value in (FSDP | {"FSDP_VERSION": "1"}).items():
        monkeypatch.setenv(name, value)
    for group, expected in ((DistributedOptions(), True), (CachedDistribution(), False)):
        opts = options("--mixed_precision=fp16")
        assert bool(list(group.check(opts, None))) == expected
        assert bool(list(group.warnings(opts, None))) == expected


def test_what_is_done_otherwise_is_reported():
    assert "FSDP2" in next(warnings(options("--deepspeed"), {}))
    assert "version 2" in next(warnings(options(), FSDP | {"FSDP_VERSION": "1"}))
    assert not list(warnings(options(), FSDP))
