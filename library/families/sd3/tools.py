"""What the tools that merge and extract networks are given for Stable Diffusion 3/3.5. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.base import opt
from library.options.model_tools import ExtractOptions, MergeOptions, ModelOption


@dataclass(frozen=True, kw_only=True)
class Sd3MergeOptions(MergeOptions):
    MODELS = (
        ModelOption("sd3_model", "save_to"),
        ModelOption("clip_l", "clip_l_save_to", "te1"),
        ModelOption("clip_g", "clip_g_save_to", "te2"),
        ModelOption("t5xxl", "t5xxl_save_to", "te3"),
    )
    FAMILIES = ("sd3",)

    sd3_model: str | None = opt(
        None, "file of the model to merge into, alone or with text encoders; without it --models become one network"
    )
    clip_l: str | None = opt(None, "file of CLIP-L to merge into")
    clip_g: str | None = opt(None, "file of CLIP-G to merge into")
    t5xxl: str | None = opt(None, "file of T5 to merge into")
    clip_l_save_to: str | None = opt(None, "file to write for --clip_l")
    clip_g_save_to: str | None = opt(None, "file to write for --clip_g")
    t5xxl_save_to: str | None = opt(None, "file to write for --t5xxl")


@dataclass(frozen=True, kw_only=True)
class Sd3ExtractOptions(ExtractOptions):
    FAMILIES = ("sd3",)
    NETWORK = "networks.lora_sd3"
