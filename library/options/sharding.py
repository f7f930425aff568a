"""How weights are to be sharded over the processes, as `accelerate config` and DeepSpeed's options request."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.runtime.documents import LARGEST_CONFIG, load_json
from library.runtime.files import read_bytes

if TYPE_CHECKING:
    from library.options.base import Options

USE_FSDP, USE_DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"  # what `accelerate launch` sets
_DEEPSPEED = "ACCELERATE_DEEPSPEED_"


@dataclass(frozen=True)
class Sharding:
    """How weights, gradients and optimizer states are sharded over all processes."""

    asked_by: str  # the option, or the engine that accelerate was launched with
    reshard: bool  # a block's weights are freed after its forward pass: FSDP's full shard, ZeRO stage 3
    offload: bool  # shards are kept in CPU memory


def sharding_of(opts: Options, environ: Mapping[str, str] = os.environ) -> Sharding | None:
    """The requested sharding; None: every process keeps everything (ZeRO stage 0, NO_SHARD).

    DeepSpeed's options of a script take precedence over what accelerate was launched with.

    Raises: UserError: DeepSpeed's configuration file cannot be read, or requests what is not supported.
    """
    options = opts.distributed
    if options.deepspeed:
        return _zero("--deepspeed", options.zero_stage, options.offload_optimizer_device, options.offload_param_device)
    if _is_on(environ, USE_DEEPSPEED):
        file = environ.get(f"{_DEEPSPEED}CONFIG_FILE", "")
        if file not in ("", "none"):
            try:
                zero: dict[str, Any] = load_json(read_bytes(Path(file), LARGEST_CONFIG)).get("zero_optimization", {})
                stage = 2 if zero.get("stage", 0) == "auto" else int(zero.get("stage", 0))
                devices = [zero.get(f"offload_{what}", {}).get("device") for what in ("optimizer", "param")]
            except (OSError, ValueError, AttributeError, TypeError) as error:
                raise UserError(f"{Path(file)}: cannot be read as DeepSpeed's configuration ({error})") from None
            return _zero("DeepSpeed", stage, *devices)
        stage = int(environ.get(f"{_DEEPSPEED}ZERO_STAGE", "2"))
        devices = [environ.get(f"{_DEEPSPEED}OFFLOAD_{what}_DEVICE") for what in ("OPTIMIZER", "PARAM")]
        return _zero("DeepSpeed", stage, *devices)
    if _is_on(environ, USE_FSDP):
        # A strategy may stand in either variable, by name or by FSDP 1's numbers.
        asked = {environ.get(name, "").upper() for name in ("FSDP_SHARDING_STRATEGY", "FSDP_RESHARD_AFTER_FORWARD")}
        if asked & {"NO_SHARD", "3"} and environ.get("FSDP_VERSION", "1") != "2":
            return None
        return Sharding("FSDP", not asked & {"FALSE", "SHARD_GRAD_OP", "2"}, _is_on(environ, "FSDP_OFFLOAD_PARAMS"))
    return None


def problems(opts: Options, environ: Mapping[str, str] = os.environ) -> Iterator[str]:
    """One line for each option that cannot be used with sharded weights."""
    try:
        sharding = sharding_of(opts, environ)
    except UserError as error:
        yield from error.problems
        return
    if sharding is None:
        return
    by, memory = sharding.asked_by, opts.memory
    if not opts.method.can_be_sharded:
        yield f"{by} shards a whole model or a ControlNet; here leave it out and use accelerate launch --multi_gpu"
        return
    if memory.mixed_precision == "fp16" or memory.full_fp16:
        yield f"{by} cannot be used with fp16, which overflows differently in each process; use --mixed_precision bf16"
    others = {
        "--blocks_to_swap": opts.swap.count > 0,
        "--stochastic_rounding": memory.stochastic_rounding,
        "--fused_backward_pass": opts.optimizer.fused_backward_pass,
        "--fused_optimizer_groups or --blockwise_fused_optimizers": opts.fused.in_use,
        "--torch_compile": memory.compiles,
        "--selective_checkpointing": bool(memory.selective_checkpointing),
        "--lowram": memory.lowram,  # each device would get the whole model first
        "--fp16_master_weights_and_gradients": opts.distributed.fp16_master_weights_and_gradients,
    }
    for flag, given in others.items():
        if given:
            yield f"{flag}: cannot be used with {by}, which shards weights over the processes; leave one of them out"


def warnings(opts: Options, environ: Mapping[str, str] = os.environ) -> Iterator[str]:
    """One line for each option whose effect differs from its name."""
    sharding = sharding_of(opts, environ)
    if sharding is None:
        return
    if sharding.asked_by != "FSDP":
        yield f"{sharding.asked_by}: weights are sharded by torch's own FSDP2, which does what ZeRO's stages describe"
    elif environ.get("FSDP_VERSION", "1") != "2":
        yield "FSDP: version 2 is used, whichever accelerate was configured for"
    if "HYBRID" in environ.get("FSDP_SHARDING_STRATEGY", "").upper():
        yield "FSDP: weights are sharded over all processes, not within each machine only (HYBRID_SHARD)"
    if _is_on(environ, "FSDP_ACTIVATION_CHECKPOINTING") and not opts.memory.gradient_checkpointing:
        yield "FSDP's activation checkpointing has no effect; use --gradient_checkpointing"


def _zero(asked_by: str, stage: int, *devices: str | None) -> Sharding | None:
    if "nvme" in devices:
        raise UserError(f"{asked_by}: weights cannot be kept on disk (nvme); use cpu, or do not offload")
    return Sharding(asked_by, stage == 3, "cpu" in devices) if stage else None


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() in ("1", "true", "yes")
