"""The options of sd3_minimal_inference.py. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.families.shared.minimal import MinimalOptions, renamed
from library.options.base import opt


@dataclass(frozen=True, kw_only=True)
class Sd3MinimalOptions(MinimalOptions):
    clip_g: str | None = opt(None, "file of the text encoder CLIP-G", exists="file")
    clip_l: str | None = opt(None, "file of the text encoder CLIP-L", exists="file")
    t5xxl: str | None = opt(None, "file of the text encoder T5-XXL", exists="file")
    t5xxl_token_length: int = opt(256, "length of prompts for T5 in tokens", at_least=1)
    apply_lg_attn_mask: bool = opt(False, "mask the padding tokens of CLIP-L and CLIP-G in attention")
    apply_t5_attn_mask: bool = opt(False, "mask the padding tokens of T5 in attention")
    cfg_scale: float = opt(5.0, "guidance scale; 1 makes no use of the negative prompt")
    offload: bool = opt(False, "keep what does not compute at present in CPU memory")
    fp16: bool = opt(False, "compute in fp16; needs a GPU")
    bf16: bool = opt(False, "compute in bf16")
    seed: int = opt(1, "seed of the image", at_least=0)
    steps: int = opt(50, "denoising steps", at_least=1, at_most=1000)
    merge_lora_weights: bool = opt(False, "merge the networks into the model: faster, their strengths stay as they are")
    width: int = opt(1024, "width in pixels", at_least=64)
    height: int = opt(1024, "height in pixels", at_least=64)

    def generating(self) -> dict[str, Any]:
        ours = renamed(vars(self), W="width", H="height", scale="cfg_scale")
        ours["t5xxl_max_token_length"] = self.t5xxl_token_length
        names = ("clip_g", "clip_l", "t5xxl", "fp16", "bf16", "seed", "steps")
        names += ("apply_lg_attn_mask", "apply_t5_attn_mask")
        return {**super().generating(), **{name: getattr(self, name) for name in names}, **ours}

    def training(self) -> Mapping[str, Any]:
        return {"offload": self.offload}
