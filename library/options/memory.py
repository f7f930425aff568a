"""Precision, attention kernels and other trades of memory for speed; several GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from library.options.base import OptionGroup, Options, opt

if TYPE_CHECKING:
    from library.families.base import FamilyTraits

_COMPILE = "compiling the model"
_PURE_HALF = "training in pure half precision"
_FP8 = "weights in 8-bit floats"


@dataclass(frozen=True, kw_only=True)
class MemoryOptions(OptionGroup, group="memory", title="Memory and speed"):
    mem_eff_attn: bool = opt(False, "memory-efficient attention without extra packages; slower than xformers")
    xformers: bool = opt(False, "attention by the xformers package; torch's own where that does not work")
    sdpa: bool = opt(False, "attention by torch's scaled_dot_product_attention, which is also the default")
    gradient_checkpointing: bool = opt(False, "compute activations again in the backward pass: less memory, slower")
    mixed_precision: Literal["no", "fp16", "bf16"] = opt("no", "number format of the computation; no means float32")
    lowram: bool = opt(
        False, "load the model straight to the GPU, for machines with little main memory", later="loading to the GPU"
    )
    highvram: bool = opt(False, "keep what fits on the GPU and do not empty its cache: faster")
    torch_compile: bool = opt(False, "compile the model for speed", later=_COMPILE)
    dynamo_backend: Literal[
        "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt", "onnxrt",
        "tensort", "ipex", "tvm",
    ] = opt("inductor", "compiler behind --torch_compile", later=_COMPILE)  # fmt: skip
    full_fp16: bool = opt(False, "gradients in fp16 too; needs --mixed_precision fp16", later=_PURE_HALF)
    full_bf16: bool = opt(False, "gradients in bf16 too; needs --mixed_precision bf16", later=_PURE_HALF)
    fp8_base: bool = opt(False, "keep the frozen base model in 8-bit floats", later=_FP8)
    fp8_base_unet: bool = opt(False, "the same for the U-Net alone", later=_FP8)
    cpu_offload_checkpointing: bool = opt(
        False, "keep checkpointed activations in main memory", later="activation offload"
    )

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        kernels = [f"--{name}" for name in ("xformers", "mem_eff_attn", "sdpa") if getattr(self, name)]
        if len(kernels) > 1:
            yield f"{kernels[0]}: cannot be used with {' and '.join(kernels[1:])}; choose one kind of attention"
        if self.full_fp16 and self.full_bf16:
            yield "--full_fp16: cannot be used with --full_bf16; drop one"
        for flag, given, needed in (("--full_fp16", self.full_fp16, "fp16"), ("--full_bf16", self.full_bf16, "bf16")):
            if given and self.mixed_precision != needed:
                yield f"{flag}: needs --mixed_precision {needed}, got {self.mixed_precision}"


@dataclass(frozen=True, kw_only=True)
class DistributedOptions(OptionGroup, group="distributed", title="Several GPUs"):
    ddp_timeout: int | None = opt(
        None, "minutes that processes wait for each other in a step; 10 if not given (30 on CPUs)", at_least=1
    )
    ddp_gradient_as_bucket_view: bool = opt(False, "share memory between gradients and their exchange")
    ddp_static_graph: bool = opt(False, "promise that every step uses the same parameters")
    deepspeed: bool = opt(False, "train with DeepSpeed; refused, as this toolkit has no part that it could drive")
    zero_stage: Literal[0, 1, 2, 3] = opt(2, "how much DeepSpeed spreads over the GPUs")
    offload_optimizer_device: Literal["cpu", "nvme"] | None = opt(None, "where DeepSpeed keeps the optimizer")
    offload_optimizer_nvme_path: str | None = opt(None, "folder for an optimizer on disk")
    offload_param_device: Literal["cpu", "nvme"] | None = opt(None, "where DeepSpeed keeps parameters")
    offload_param_nvme_path: str | None = opt(None, "folder for parameters on disk")
    zero3_init_flag: bool = opt(False, "spread the model while it is built (stage 3)")
    zero3_save_16bit_model: bool = opt(False, "gather 16-bit weights for saving (stage 3)")
    fp16_master_weights_and_gradients: bool = opt(False, "master weights and gradients in fp16")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.deepspeed:
            yield "--deepspeed: not supported; leave it out, several GPUs work with accelerate launch --multi_gpu"
        for variable, name in _OTHER_ENGINES.items():
            if os.environ.get(variable, "false").lower() in ("1", "true"):
                yield f"accelerate was launched with {name}, which is not supported; choose --multi_gpu in its place"

    def advise(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        for name in ("ddp_gradient_as_bucket_view", "ddp_static_graph"):
            if getattr(self, name):
                yield f"--{name}: no effect, as all gradients are exchanged in one message anyway"
        if not self.deepspeed:
            for name in _OF_DEEPSPEED & opts.explicit:
                yield f"--{name}: no effect without --deepspeed, which is not supported"


# What `accelerate launch` sets for engines that wrap the model, which networks attached by hooks do not survive.
_OTHER_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
_OF_DEEPSPEED = frozenset(
    (
        "zero_stage",
        "offload_optimizer_device",
        "offload_optimizer_nvme_path",
        "offload_param_device",
        "offload_param_nvme_path",
        "zero3_init_flag",
        "zero3_save_16bit_model",
        "fp16_master_weights_and_gradients",
    )
)
