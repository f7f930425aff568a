"""Options of the scripts for large models: reading, cached text-encoder outputs, swapping of blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options.base import OptionGroup, Options, opt
from library.options.models import ModelOptions

if TYPE_CHECKING:
    from library.families.base import FamilyTraits


@dataclass(frozen=True, kw_only=True)
class LargeModelOptions(ModelOptions):
    disable_mmap_load_safetensors: bool = opt(
        False, "read model files at once instead of mapping them; faster from network drives and under WSL"
    )


@dataclass(frozen=True, kw_only=True)
class TextCacheOptions(OptionGroup, group="text_cache", title="Text encoder outputs"):
    cache_text_encoder_outputs: bool = opt(
        False, "encode every caption once, before training, and free the text encoders; captions must not change"
    )
    cache_text_encoder_outputs_to_disk: bool = opt(
        False, "the same, and keep the outputs in files beside the pictures for later runs"
    )
    text_encoder_batch_size: int | None = opt(
        None, "captions that are encoded at once while caching; the training batch size if not given", at_least=1
    )

    @property
    def in_use(self) -> bool:
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk

    def advise(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.text_encoder_batch_size is not None and not self.in_use:
            yield "--text_encoder_batch_size: no effect without --cache_text_encoder_outputs"


@dataclass(frozen=True, kw_only=True)
class BlockSwapOptions(OptionGroup, group="swap", title="Block swap"):
    blocks_to_swap: int | None = opt(
        None, "keep this many of the denoiser's blocks in main memory and bring each to the GPU in its turn", at_least=0
    )
