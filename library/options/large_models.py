"""Options of the scripts for large models: reading, cached text-encoder outputs, swapping of blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options.base import OptionGroup, Options, opt
from library.options.models import ModelOptions
from library.options.optimizer import has_global_state, is_schedule_free, optimizer_name

if TYPE_CHECKING:
    from library.types import FamilyTraits

_SPLIT_MODE_BLOCKS = 18


@dataclass(frozen=True, kw_only=True)
class LargeModelOptions(ModelOptions):
    disable_mmap_load_safetensors: bool = opt(
        False, "read model files completely instead of memory-mapping them; faster from network drives and under WSL"
    )


@dataclass(frozen=True, kw_only=True)
class TextCacheOptions(OptionGroup, group="text_cache", title="Text encoder outputs", always=True):
    cache_text_encoder_outputs: bool = opt(
        False, "encode every caption once, before training, and free the text encoders; captions must not change"
    )
    cache_text_encoder_outputs_to_disk: bool = opt(
        False, "as --cache_text_encoder_outputs, and keep the outputs in files beside the images for later runs"
    )
    text_encoder_batch_size: int | None = opt(
        None, "captions encoded at a time while caching; the training batch size if not given", at_least=1, off=0
    )

    @property
    def in_use(self) -> bool:
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.text_encoder_batch_size is not None and not self.in_use:
            yield "--text_encoder_batch_size: has no effect without --cache_text_encoder_outputs"


@dataclass(frozen=True, kw_only=True)
class BlockSwapOptions(OptionGroup, group="swap", title="Block swap", always=True):
    blocks_to_swap: int | None = opt(
        None, "number of the denoiser's blocks to swap between CPU memory and GPU: less GPU memory, slower", at_least=0
    )

    @property
    def count(self) -> int:
        """The number of blocks to swap."""
        return self.blocks_to_swap or 0

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if not self.count:
            return
        flag = "--blocks_to_swap"
        if opts.memory.cpu_offload_checkpointing:
            yield f"{flag}: cannot be used with --cpu_offload_checkpointing; choose one of them"
        if opts.memory.compiles and opts.memory.has_cuda_graphs:
            graphs = f"{opts.memory.backend_flag} cudagraphs"
            if opts.memory.backend != "cudagraphs":
                graphs = f"--compile_mode {opts.memory.compile_mode}"
            yield f"{flag}: cannot be used with {graphs}, whose weights must not move"
        if opts.method.trains_model:
            if not opts.optimizer.fused_backward_pass:
                yield f"{flag}: needs --fused_backward_pass here, so that a block is stepped while it is on the GPU"
            if is_schedule_free(opts.optimizer):
                yield f"{flag}: cannot be used with {optimizer_name(opts.optimizer)}, which needs all weights at once"


@dataclass(frozen=True, kw_only=True)
class SplitModeOptions(BlockSwapOptions):
    split_mode: bool = opt(False, "by itself the same as --blocks_to_swap 18", deprecated="--blocks_to_swap 18")

    @property
    def count(self) -> int:
        return _SPLIT_MODE_BLOCKS if self.split_mode and self.blocks_to_swap is None else self.blocks_to_swap or 0


@dataclass(frozen=True, kw_only=True)
class OldBlockSwapOptions(BlockSwapOptions):
    double_blocks_to_swap: int | None = opt(
        None, "number of double blocks to swap", at_least=0, deprecated="--blocks_to_swap"
    )
    single_blocks_to_swap: int | None = opt(
        None, "number of single blocks to swap; two of them count as one", at_least=0, deprecated="--blocks_to_swap"
    )

    @property
    def count(self) -> int:
        if self.blocks_to_swap is not None:
            return self.blocks_to_swap
        return (self.double_blocks_to_swap or 0) + (self.single_blocks_to_swap or 0) // 2


@dataclass(frozen=True, kw_only=True)
class ModulationOptions(OptionGroup, group="modulation", title="Modulation", always=True):
    evict_modulation: int | None = opt(
        None,
        "keep the frozen modulation layers, a quarter of FLUX.1's weights, in CPU memory, and compute them for so many "
        "batches at a time; 32 is a good start",
        at_least=1,
        off=0,
    )

    @property
    def count(self) -> int:
        """The number of batches for which modulation is computed at a time; 0: it is not evicted."""
        return self.evict_modulation or 0

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if not self.count:
            return
        flag = "--evict_modulation"
        if not (opts.data.cache_latents or opts.data.cache_latents_to_disk):
            yield f"{flag}: needs --cache_latents, as each image would be encoded twice"
        if not opts.text_cache.in_use:
            yield f"{flag}: needs --cache_text_encoder_outputs, as it looks at the texts of several batches"
        others = {
            "--blocks_to_swap, which moves these weights itself": opts.swap.count > 0,
            f"--quantize_base {opts.memory.quantize_base}; choose fp8": opts.memory.quantize_base in ("int8", "nf4"),
            "--torch_compile": opts.memory.compiles,
        }
        for other, given in others.items():
            if given:
                yield f"{flag}: cannot be used with {other}"


@dataclass(frozen=True, kw_only=True)
class FusedOptions(OptionGroup, group="fused", title="Steps inside the backward pass", always=True):
    fused_optimizer_groups: int | None = opt(
        None,
        "step the weights in this many groups inside the backward pass; more groups take less memory; 4 "
        "to 10 are usual",
        at_least=1,
        off=0,
    )
    blockwise_fused_optimizers: bool = opt(
        False, "step each of the denoiser's blocks inside the backward pass, with any optimizer"
    )

    @property
    def in_use(self) -> bool:
        return self.fused_optimizer_groups is not None or self.blockwise_fused_optimizers

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if not self.in_use:
            return
        flag = "--blockwise_fused_optimizers" if self.blockwise_fused_optimizers else "--fused_optimizer_groups"
        if self.blockwise_fused_optimizers and self.fused_optimizer_groups is not None:
            yield f"{flag}: cannot be used with --fused_optimizer_groups; choose one of them"
        if opts.optimizer.fused_backward_pass:
            yield f"{flag}: cannot be used with --fused_backward_pass; choose one of them"
        if has_global_state(opts.optimizer):
            yield f"{flag}: {optimizer_name(opts.optimizer)} must see all weights at once; choose another optimizer"
        if opts.training.gradient_accumulation_steps > 1:
            yield f"{flag}: cannot be used with --gradient_accumulation_steps; gradients are gone after each batch"
        if opts.memory.mixed_precision == "fp16":
            yield f"{flag}: cannot be used with --mixed_precision fp16, whose steps wait for all gradients; use bf16"
        if opts.memory.stochastic_rounding:
            yield f"{flag}: cannot be used with --stochastic_rounding; use --fused_backward_pass instead"

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.in_use and opts.optimizer.max_grad_norm:
            yield "--max_grad_norm: not applied when weights are stepped inside the backward pass"
