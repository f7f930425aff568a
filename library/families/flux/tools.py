"""What the tools that merge and extract networks are given for FLUX.1. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options.base import Options, opt
from library.options.model_files import precision_problem
from library.options.model_tools import ExtractOptions, MergeOptions, ModelOption

if TYPE_CHECKING:
    from library.types import FamilyTraits

STREAMED = "has no effect: weights are always read and written one at a time"


@dataclass(frozen=True, kw_only=True)
class FluxMergeOptions(MergeOptions, without=("device",)):
    MODELS = (
        ModelOption("flux_model", "save_to"),
        ModelOption("clip_l", "clip_l_save_to", "te1"),
        ModelOption("t5xxl", "t5xxl_save_to", "te3"),
    )
    FAMILIES = ("flux",)

    save_precision: str | None = opt(
        None,
        "dtype of the files that are written: float, fp16, bf16, fp8_e4m3fn or fp8_e5m2; by default that of the "
        "model's file, and without a model --precision",
    )
    precision: str = opt(
        "float", "dtype in which changes are added to weights; the changes themselves are computed in float32"
    )
    flux_model: str | None = opt(
        None, "file of FLUX.1 to merge into, alone or with all parts; without any model --models become one network"
    )
    clip_l: str | None = opt(None, "file of CLIP-L to merge into")
    t5xxl: str | None = opt(None, "file of T5 to merge into")
    clip_l_save_to: str | None = opt(None, "file to write for --clip_l")
    t5xxl_save_to: str | None = opt(None, "file to write for --t5xxl")
    mem_eff_load_save: bool = opt(False, STREAMED)
    loading_device: str = opt("cpu", "has no effect: weights are read one at a time, to --working_device")
    working_device: str = opt("cpu", "device to compute on, such as cuda")
    diffusers: bool = opt(
        False, "has no effect: networks in the layouts of diffusers and ai-toolkit are known by their names"
    )

    @property
    def device_name(self) -> str:
        return self.working_device

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().check(opts, traits)
        for flag in ("save_precision", "precision"):
            yield from filter(None, [precision_problem(f"--{flag}", getattr(self, flag))])
        if "8" in self.precision:
            yield f"--precision: {self.precision}: nothing can be computed in 8 bits; use float, and --save_precision"


@dataclass(frozen=True, kw_only=True)
class FluxExtractOptions(ExtractOptions):
    FAMILIES = ("flux",)
    NETWORK = "networks.lora_flux"

    mem_eff_safe_open: bool = opt(False, STREAMED)
