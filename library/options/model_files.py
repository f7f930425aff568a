"""The tools for whole model files: merging, bundling, converting, upscaling."""

from __future__ import annotations

from ast import literal_eval
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


@dataclass(frozen=True, kw_only=True)
class ConvertModelOptions(OptionGroup, group="convert", title="Conversion"):
    model_to_load: str | None = opt(None, "a checkpoint file, or a Diffusers folder or hub id", positional=True)
    model_to_save: str | None = opt(
        None, "with .safetensors, .ckpt or .pt a file, without such an ending a Diffusers folder", positional=True
    )
    v1: bool = opt(False, "the model is of version 1.x; found out where neither is given")
    v2: bool = opt(False, "the model is of version 2.x; found out where neither is given")
    unet_use_linear_projection: bool = opt(
        False, "in a Diffusers folder: linear layers where a file has 1x1 convolutions, as published 2.x folders have"
    )
    fp16: bool = opt(False, "the same as --save_precision_as=fp16")
    bf16: bool = opt(False, "the same as --save_precision_as=bf16")
    float: bool = opt(False, "the same as --save_precision_as=float")
    save_precision_as: Literal["fp16", "bf16", "float"] = opt(
        "no", "precision of what is written, file or folder; by default that of what is read"
    )
    epoch: int = opt(0, "for .ckpt: epochs to add to those that the model to load has counted", at_least=0)
    global_step: int = opt(0, "for .ckpt: steps to add to those that the model to load has counted", at_least=0)
    metadata: str | None = opt(
        None, """for .safetensors: metadata to add, such as '{"name": "my model", "resolution": "512x512"}'"""
    )
    variant: str | None = opt(None, "variant of a Diffusers model's weights to load, such as fp16")
    reference_model: str | None = opt(
        None, "Diffusers folder whose scheduler and tokenizer a new Diffusers folder gets; by default the model's own"
    )
    use_safetensors: bool = opt(False, "write the weights of a Diffusers folder as .safetensors, in place of .bin")

    @property
    def precision(self) -> str | None:
        """The precision that is asked for, one of `PRECISIONS`."""
        named = [name for name in ("fp16", "bf16", "float") if getattr(self, name)]
        return named[0] if named else None if self.save_precision_as == "no" else self.save_precision_as

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.v1 and self.v2:
            yield "--v1 and --v2 exclude each other"
        asked = {name for name in ("fp16", "bf16", "float") if getattr(self, name)}
        asked |= set() if self.save_precision_as == "no" else {self.save_precision_as}
        if len(asked) > 1:
            yield f"--save_precision_as: {' and '.join(sorted(asked))} are asked for; choose one precision"
        try:
            self.added_metadata()
        except ValueError as error:
            yield f"--metadata: {error}"

    def added_metadata(self) -> dict[str, str]:
        """--metadata as texts by name. Raises: ValueError: it is no dictionary."""
        if self.metadata is None:
            return {}
        try:
            values = literal_eval(self.metadata)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise ValueError(f"""must be a dictionary such as '{{"name": "my model"}}', got {self.metadata!r}""")
        return {str(key): str(value) for key, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class DrawingOptions(OptionGroup, group="drawing", title="Image"):
    model_id: str | None = opt(None, "Diffusers folder or hub id of the model")
    lora_weights: str | None = opt(None, "network file, of any type and layout", exists="file")
    multiplier: float = opt(1.0, "strength of the network")
    prompt: str = opt("A photo of cat", "what the image shows")
    negative_prompt: str = opt("", "what it does not show, for models with classifier-free guidance")
    seed: int = opt(0, "seed of the image")
    steps: int = opt(30, "number of sampling steps", at_least=1)
    output: str = opt("image.png", "the image file to write, .png")
    device: str | None = opt(None, "where the image is made; by default cuda where there is a GPU, else cpu")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from (f"--{name} is required" for name in ("model_id", "lora_weights") if getattr(self, name) is None)
        if not self.output.lower().endswith(".png"):
            yield f"--output: must end in .png, got {self.output}"


@dataclass(frozen=True, kw_only=True)
class UpscalingOptions(OptionGroup, group="upscaling", title="Upscaling"):
    vae_path: str | None = opt(
        None, "VAE to encode and decode with: a file, a Diffusers folder or a model that has one; by default --weights'"
    )
    weights: str | None = opt(
        None,
        "Diffusers folder or hub id of a latent upscaler (StableDiffusionLatentUpscalePipeline, such as "
        "stabilityai/sd-x2-latent-upscaler); weight files of other upscalers cannot be read",
    )
    image_pattern: str | None = opt(None, "the images, such as 'images/*.png'; in quotes, or the shell expands it")
    output_dir: str = opt(".", "folder for the results, <name>.png; made if missing")
    batch_size: int = opt(4, "images of one size that are upscaled together", at_least=1)
    vae_batch_size: int = opt(1, "images that are encoded and decoded together", at_least=1)
    debug: bool = opt(False, "also write <name>_vae.png, the image as the VAE alone gives it back")
    steps: int = opt(20, "number of sampling steps", at_least=1)
    seed: int = opt(0, "seed of each image's noise", at_least=0)
    device: str | None = opt(None, "where images are made; by default cuda where there is a GPU, else cpu")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.weights is None:
            yield (
                "--weights is required: the Diffusers folder of a latent upscaler, such as that of "
                "stabilityai/sd-x2-latent-upscaler"
            )
        if self.image_pattern is None:
            yield "--image_pattern is required: the images, such as 'images/*.png'"


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(OptionGroup, group="verify", title="What is verified"):
    network: str | None = opt(None, "network file, of any type and layout", positional=True)
    model: str | None = opt(None, "model that it is for: a file or Diffusers folder; with it changes are relative")
    clip_l: str | None = opt(None, "file of CLIP-L, where the model's file has none", only_with=("model",))
    clip_g: str | None = opt(None, "file of CLIP-G, where the model's file has none", only_with=("model",))
    t5xxl: str | None = opt(None, "file of T5, where the model's file has none", only_with=("model",))
    plot: str | None = opt(None, "also draw the changes by block into this file, .png")
    json: str | None = opt(None, "also write all findings, layer by layer, to this file")
    show_layers: bool = opt(False, "print a line for each layer, too")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.plot is not None and not self.plot.lower().endswith(".png"):
            yield f"--plot: must end in .png, got {self.plot}"
