"""The tools for whole model files: merging, bundling, converting, upscaling."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from library.options.base import OptionGroup, Options, opt

if TYPE_CHECKING:
    from library.types import FamilyTraits

# Every name that a precision has on these command lines; the dtype is torch's attribute of that name.
PRECISIONS = {
    "float": "float32",
    "float32": "float32",
    "fp32": "float32",
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "float8": "float8_e4m3fn",
    "fp8_e4m3fn": "float8_e4m3fn",
    "float8_e4m3fn": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "float8_e5m2": "float8_e5m2",
}


def precision_problem(flag: str, value: str | None) -> str | None:
    """What is wrong with a precision that is given as a free text, or None."""
    if value is None or value.lower() in PRECISIONS:
        return None
    return f"{flag}: must be one of float, fp16, bf16, fp8_e4m3fn, fp8_e5m2, got {value!r}"


@dataclass(frozen=True, kw_only=True)
class MergeModelsOptions(OptionGroup, group="merge", title="Merging models"):
    models: list[str] | None = opt(None, "files of the models; the first one decides what the result holds")
    output: str | None = opt(None, "the file to write, .safetensors")
    ratios: list[float] | None = opt(
        None, "one factor for each model, such as 0.7 0.3, or 1 1 -1 to add a difference; equal shares by default"
    )
    unet_only: bool = opt(False, "merge the denoiser only; text encoders and VAE are those of the first model")
    device: str = opt("cpu", "where sums are computed, e.g. cuda")
    precision: Literal["float", "fp16", "bf16"] = opt("float", "precision of the sums")
    saving_precision: Literal["float", "fp16", "bf16"] = opt("float", "precision of the file that is written")
    show_skipped: bool = opt(False, "name the tensors that a model lacks, and those that only later models have")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if not self.models:
            yield "--models is required: name the files to merge"
        if not self.output:
            yield "--output is required: name the file to write"
        if self.models and self.ratios and len(self.ratios) != len(self.models):
            yield f"--ratios: {len(self.ratios)} for {len(self.models)} models; give one for each"


@dataclass(frozen=True, kw_only=True)
class BundleOptions(OptionGroup, group="bundle", title="Parts of the bundle"):
    dit: str | None = opt(None, "file of the denoiser (MMDiT), alone or with other parts", required=True)
    vae: str | None = opt(None, "file of the VAE, or of a model that has one")
    clip_l: str | None = opt(None, "file of CLIP-L")
    clip_g: str | None = opt(None, "file of CLIP-G")
    t5xxl: str | None = opt(None, "file of T5")
    output: str = opt("merged_model.safetensors", "the file to write, .safetensors")
    device: str = opt("cpu", "where precisions are converted, e.g. cuda", only_with=("save_precision",))
    save_precision: str | None = opt(
        None, "precision of the file: float, fp16, bf16, fp8_e4m3fn or fp8_e5m2; by default that of each part's file"
    )

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from filter(None, [precision_problem("--save_precision", self.save_precision)])


@dataclass(frozen=True, kw_only=True)
class ToOriginalOptions(OptionGroup, group="original", title="Conversion"):
    diffusers_path: str | None = opt(
        None,
        "Diffusers folder of the model, its transformer folder, or the transformer's file (of several the first)",
        required=True,
    )
    save_to: str | None = opt(None, "the file to write, .safetensors", required=True)
    mem_eff_load_save: bool = opt(
        False, "tensors are always read and written one at a time; the option makes no difference"
    )
    save_precision: str | None = opt(
        None, "precision of the file: float, fp16, bf16, fp8_e4m3fn or fp8_e5m2; by default as it was"
    )

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from filter(None, [precision_problem("--save_precision", self.save_precision)])
