"""What the tools that merge and extract networks are given for Stable Diffusion 1.x/2.x. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options.base import OptionGroup, Options, opt
from library.options.model_tools import ExtractOptions, MergeOptions, ModelOption, Precision
from library.options.network_tools import missing

if TYPE_CHECKING:
    from library.types import FamilyTraits

V2 = "has no effect: the file shows whether it is Stable Diffusion 2.x"


@dataclass(frozen=True, kw_only=True)
class SdMergeOptions(MergeOptions):
    MODELS = (ModelOption("sd_model", "save_to"),)
    FAMILIES = ("sd",)

    v2: bool = opt(False, V2)
    sd_model: str | None = opt(
        None, "file of the model to merge into, .safetensors or .ckpt; without it --models become one network"
    )


@dataclass(frozen=True, kw_only=True)
class SdExtractOptions(ExtractOptions):
    FAMILIES = ("sd", "sdxl")

    v2: bool = opt(False, V2)
    v_parameterization: bool | None = opt(
        None, "note in the metadata that the models predict v; by default so for 2.x, and where a file is marked so"
    )
    sdxl: bool = opt(False, "has no effect: the file shows whether it is SDXL")
    load_precision: Precision | None = opt(
        None, "dtype to which the models' weights are rounded before they are compared; by default as they are"
    )
    conv_dim: int | None = opt(
        None,
        "rank of 3x3 convolutions, which are left out by default; with it, resnets' linear layers get --dim",
        at_least=1,
    )
    min_diff: float = opt(
        0.01, "leave out text encoders of which no weight differs by more than this between the models", at_least=0
    )
    load_original_model_to: str | None = opt(None, "has no effect: weights are read one at a time")
    load_tuned_model_to: str | None = opt(None, "has no effect: weights are read one at a time")

    @property
    def least_change(self) -> float:
        return self.min_diff

    @property
    def rank_of_kernels(self) -> int:
        return self.conv_dim or 0

    @property
    def predicts_v(self) -> bool:
        return bool(self.v_parameterization)


@dataclass(frozen=True, kw_only=True)
class InterrogateOptions(OptionGroup, group="interrogate", title="Asking a network for its words"):
    v2: bool = opt(False, "the model is Stable Diffusion 2.x")
    sd_model: str | None = opt(None, "model that the network is for: file, Diffusers folder or hub id")
    model: str | None = opt(None, "network file that adapts text encoders", exists="file")
    batch_size: int = opt(16, "tokens encoded at a time", at_least=1)
    clip_skip: int | None = opt(None, "use the states of this layer from the end", at_least=1)

    @property
    def base_model(self) -> str | None:
        return self.sd_model

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        return missing(self, "sd_model", "model")
