"""Precision, attention kernels and other trades of memory for speed; several GPUs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from library.options import sharding
from library.options.base import OptionGroup, Options, opt
from library.options.optimizer import is_schedule_free, optimizer_name
from library.runtime.packages import remedy

if TYPE_CHECKING:
    from library.types import FamilyTraits


_COMPILES = ("torch_compile", "compile")
Backend = Literal[
    "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt", "onnxrt",
    "tensort", "ipex", "tvm", "no",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MemoryOptions(OptionGroup, group="memory", title="Memory and speed"):
    mem_eff_attn: bool = opt(False, "memory-efficient attention without extra packages; slower than xformers")
    xformers: bool = opt(False, "attention by the xformers package; torch's own where that does not work")
    sdpa: bool = opt(False, "attention by torch's scaled_dot_product_attention, which is also the default")
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, slower")
    mixed_precision: Literal["no", "fp16", "bf16"] = opt(
        "no",
        "dtype of the computation; no means float32",
        instead={"fp8": "--fp8_base keeps the weights that are not trained in 8 bits, with bf16 here"},
    )
    lowram: bool = opt(False, "load the model directly to the GPU, for machines with little CPU memory")
    highvram: bool = opt(False, "keep parts of the model on the GPU where they fit, and do not empty its cache: faster")
    torch_compile: bool = opt(False, "compile the denoiser's blocks: slow first steps, then faster ones")
    dynamo_backend: Backend = opt(
        "inductor",
        "backend of --torch_compile; no disables it; which backends work depends on the machine",
        only_with=("torch_compile",),
        synonyms={"tensorrt": "tensort"},
    )
    compile: bool = opt(False, "the same as --torch_compile, with the backend of --compile_backend")
    compile_backend: Backend = opt(
        "inductor", "backend of --compile", only_with=("compile",), synonyms={"tensorrt": "tensort"}
    )
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = opt(
        "default", "what inductor optimises for: max-autotune tries kernels for longer", only_with=_COMPILES
    )
    compile_dynamic: Literal["true", "false", "auto"] | None = opt(
        None,
        "one graph for all shapes (true), one for each (false, the default), or one for all after the second (auto)",
        only_with=_COMPILES,
    )
    compile_fullgraph: bool = opt(
        False, "end the run where a block cannot be compiled as one graph", only_with=_COMPILES
    )
    compile_cache_size_limit: int | None = opt(
        None,
        "most graphs that the compiler makes of blocks; further shapes run uncompiled; 1024 if not given",
        at_least=1,
        off=0,
        only_with=_COMPILES,
    )
    cuda_allow_tf32: bool = opt(
        False, "compute float32 products of matrices in TF32 on NVIDIA GPUs: faster, with 10 bits of precision"
    )
    cuda_cudnn_benchmark: bool = opt(
        False, "let cuDNN try its convolutions for each shape first: faster where there are few shapes"
    )
    full_fp16: bool = opt(False, "trained weights and gradients in fp16 too; needs --mixed_precision fp16")
    full_bf16: bool = opt(False, "trained weights and gradients in bf16 too; needs --mixed_precision bf16")
    stochastic_rounding: bool = opt(
        False, "write bf16 weights with stochastic rounding, so that small steps are not lost; needs --full_bf16"
    )
    fp8_base: bool = opt(False, "store the frozen base model's weights in 8-bit floats, text encoders too")
    fp8_base_unet: bool = opt(False, "store the frozen denoiser's weights in 8-bit floats, but not the text encoders'")
    quantize_base: Literal["fp8", "int8", "nf4"] | None = opt(
        None,
        "quantize the frozen base model's weights, text encoders too; fp8 means --fp8_base, nf4 takes "
        "4.5 bits per weight",
    )
    cpu_offload_checkpointing: bool = opt(
        False, "keep checkpointed activations in CPU memory; needs --gradient_checkpointing"
    )
    selective_checkpointing: float | None = opt(
        None,
        "with --gradient_checkpointing: keep of each of the denoiser's blocks those activations that take longest to "
        "recompute, up to so many times the size of its input; 3 is a good start",
        above=0,
        off=0,
    )

    @property
    def attention(self) -> tuple[str, ...]:
        """The kinds of attention that are asked for; the first one is used, as in the ancestor."""
        return tuple(name for name in ("mem_eff_attn", "xformers", "sdpa") if getattr(self, name))

    @property
    def compiles(self) -> bool:
        """Whether the denoiser is compiled."""
        return (self.torch_compile or self.compile) and self.backend != "no"

    @property
    def backend(self) -> str:
        """What compiles it, or "no"."""
        return self.compile_backend if self.compile else self.dynamo_backend

    @property
    def backend_flag(self) -> str:
        """The option that says what compiles it."""
        return "--compile_backend" if self.compile else "--dynamo_backend"

    @property
    def has_cuda_graphs(self) -> bool:
        """Whether what is compiled is recorded as CUDA graphs, whose memory must stay where it is."""
        modes = ("reduce-overhead", "max-autotune")
        return self.backend == "cudagraphs" or (self.backend == "inductor" and self.compile_mode in modes)

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.full_fp16 and self.full_bf16:
            yield "--full_fp16: cannot be used with --full_bf16; use one of them"
        for flag, given, needed in (("--full_fp16", self.full_fp16, "fp16"), ("--full_bf16", self.full_bf16, "bf16")):
            if given and self.mixed_precision != needed:
                yield f"{flag}: needs --mixed_precision {needed}, got {self.mixed_precision}"
        if self.stochastic_rounding and not self.full_bf16:
            yield "--stochastic_rounding: needs --full_bf16; float32 weights need no stochastic rounding"
        elif self.stochastic_rounding and is_schedule_free(opts.optimizer):
            yield f"--stochastic_rounding: {optimizer_name(opts.optimizer)} averages its weights, which must be float32"
        if self.cpu_offload_checkpointing and not self.gradient_checkpointing:
            yield "--cpu_offload_checkpointing: needs --gradient_checkpointing"
        if self.selective_checkpointing:
            yield from self._selective_problems(opts)
        for flag, given in (("--fp8_base", self.fp8_base), ("--fp8_base_unet", self.fp8_base_unet)):
            if given and opts.method.trains_model:
                yield f"{flag}: only weights that are not trained can be kept in 8 bits; this script trains them all"
            if given and self.quantize_base not in (None, "fp8"):
                yield f"--quantize_base: {self.quantize_base} cannot be used with {flag}, which means fp8; use one"
        if self.quantize_base not in (None, "fp8"):
            from importlib import metadata  # here, as it imports many modules that are seldom needed

            lack = None
            try:
                found = metadata.version("bitsandbytes")
                if tuple(int(number) for number in re.findall(r"\d+", found)[:2]) < _OLDEST_BITSANDBYTES:
                    oldest = ".".join(map(str, _OLDEST_BITSANDBYTES))
                    lack = f"needs bitsandbytes {oldest} or newer, {found} is installed"
            except metadata.PackageNotFoundError:
                lack = "needs the package bitsandbytes, which is not installed"
            if lack:
                yield f"--quantize_base: {self.quantize_base} {lack}; {remedy('bitsandbytes')}; or choose fp8"

    def _selective_problems(self, opts: Options) -> Iterable[str]:
        flag = "--selective_checkpointing"
        if not self.gradient_checkpointing:
            yield f"{flag}: needs --gradient_checkpointing"
        others = {
            "--cpu_offload_checkpointing": self.cpu_offload_checkpointing,
            "--torch_compile, as the compiler chooses what is recomputed": self.compiles,
            "--blocks_to_swap": opts.swap.count > 0,
        }
        for other, given in others.items():
            if given:
                yield f"{flag}: cannot be used with {other}; choose one of them"

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        used, *others = self.attention or ("sdpa",)
        for name in others:
            yield f"--{name}: has no effect with --{used}, which is used"
        if (self.torch_compile or self.compile) and not self.compiles:
            yield f"--{'compile' if self.compile else 'torch_compile'}: has no effect with {self.backend_flag} no"
        if self.compiles and self.compile_mode != "default" and self.backend != "inductor":
            yield f"--compile_mode: has no effect with the backend {self.backend}"


_DEEPSPEED = ("deepspeed",)


@dataclass(frozen=True, kw_only=True)
class DistributedOptions(OptionGroup, group="distributed", title="Several GPUs"):
    trains: ClassVar[bool] = True  # False: nothing is trained, so it does not matter how accelerate would shard it

    ddp_timeout: int | None = opt(
        None, "minutes that processes wait for each other in a step; 10 if not given (30 on CPUs)", at_least=1, off=0
    )
    ddp_gradient_as_bucket_view: bool = opt(False, "let gradients share memory with the all-reduce buckets")
    ddp_static_graph: bool = opt(False, "assume that every step uses the same parameters")
    deepspeed: bool = opt(False, "shard the trained model over the processes as --zero_stage says (with torch's FSDP2)")
    zero_stage: Literal[0, 1, 2, 3] = opt(
        2,
        "0: nothing is sharded; 1, 2: gradients and optimizer states; 3: weights too, gathered block by block",
        only_with=_DEEPSPEED,
    )
    offload_optimizer_device: Literal["cpu", "nvme"] | None = opt(
        None, "cpu: keep sharded weights and optimizer states in CPU memory; nvme is refused", only_with=_DEEPSPEED
    )
    offload_optimizer_nvme_path: str | None = opt(
        None, "folder for an optimizer on disk; refused with nvme", only_with=_DEEPSPEED
    )
    offload_param_device: Literal["cpu", "nvme"] | None = opt(
        None, "the same as --offload_optimizer_device", only_with=_DEEPSPEED
    )
    offload_param_nvme_path: str | None = opt(
        None, "folder for parameters on disk; refused with nvme", only_with=_DEEPSPEED
    )
    zero3_init_flag: bool = opt(
        False, "shard the model while it is built; always done, block by block", only_with=_DEEPSPEED
    )
    zero3_save_16bit_model: bool = opt(
        False, "gather weights for saving; always done, in the dtype of --save_precision", only_with=_DEEPSPEED
    )
    fp16_master_weights_and_gradients: bool = opt(
        False, "master weights and gradients in fp16; refused", only_with=_DEEPSPEED
    )

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if not self.trains:
            return
        yield from sharding.problems(opts)
        if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "false").lower() in ("1", "true"):
            yield "accelerate was launched with Megatron-LM, which is not supported; choose FSDP instead"

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        for name in ("ddp_gradient_as_bucket_view", "ddp_static_graph"):
            if getattr(self, name):
                yield f"--{name}: has no effect, as all gradients are exchanged in one message anyway"
        if self.trains:
            yield from sharding.warnings(opts)


_OLDEST_BITSANDBYTES = 0, 49  # those before crash on CPUs where a whole block of weights is 0
