"""What the tool that merges networks is given for SDXL. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.base import opt
from library.options.model_tools import MergeOptions, ModelOption


@dataclass(frozen=True, kw_only=True)
class SdxlMergeOptions(MergeOptions):
    MODELS = (ModelOption("sd_model", "save_to"),)
    FAMILIES = ("sdxl",)

    sd_model: str | None = opt(
        None, "file of the model to merge into, .safetensors or .ckpt; without it --models become one network"
    )
