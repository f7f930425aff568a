"""The options of the scripts that generate images, but for the model's files, which its family knows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from library.options.base import OptionGroup, Options, opt
from library.options.inference_images import (
    ControlOptions,
    GradualOptions,
    GridOptions,
    HighresOptions,
    OldControlOptions,
    OldGuidanceOptions,
    OutputOptions,
    ShrinkOptions,
    SourceOptions,
)
from library.options.logging import ConsoleOptions
from library.options.network import find_module, resolved_module, what_to_do
from library.options.optimizer import not_pairs
from library.options.sampling import PromptTextOptions, Sampler

if TYPE_CHECKING:
    from library.types import FamilyTraits

PROMPT_FILES = (".txt", ".toml", ".json")


class GenerationConsole(ConsoleOptions, group="console", title="Messages"):
    pass


@dataclass(frozen=True, kw_only=True)
class PromptOptions(OptionGroup, group="prompts", title="Prompts"):
    prompt: str | None = opt(
        None,
        "prompt line: a text, and options such as --n for the negative prompt behind it. Without any prompt, images of "
        "--image_path are drawn with those in their files",
    )
    from_file: str | None = opt(
        None,
        "file of prompts: .txt with a prompt line each, or a .toml or .json file as for --sample_prompts",
        exists="file",
    )
    from_module: str | None = opt(
        None, "module, or file of one, whose get_prompter(args, pipe, networks) gives prompt lines"
    )
    prompter_module_args: str | None = opt(None, "arguments of --from_module")
    interactive: bool = opt(False, "ask for prompt lines until the input ends")
    no_preview: bool = opt(False, "with --interactive: do not show the images", only_with=("interactive",))
    images_per_prompt: int = opt(1, "images of each prompt; dynamic prompts are drawn again for each", at_least=1)
    n_iter: int = opt(1, "how many times all prompts are gone through", at_least=1)
    shuffle_prompts: bool = opt(False, "go through the prompts in another order in each iteration")
    seed: int | None = opt(
        None, "seed of the image; of several images, what the seed of each is derived from", at_least=0
    )
    iter_same_seed: bool = opt(False, "the same seed for all prompts of an iteration that have none of their own")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterator[str]:
        given = [f"--{name}" for name in ("prompt", "from_file", "from_module", "interactive") if getattr(self, name)]
        axes = [entry.partition("=")[0].strip() for entry in opts.grid.grid or ()]
        if not given and not opts.source.image_path and "prompt" not in axes:
            yield "--prompt: missing; give a prompt, or prompts with --from_file"
        if len(given) > 1:
            yield f"{' and '.join(given)} exclude each other; give one of them"
        if self.from_module and not self.from_module.endswith(".py") and not find_module(self.from_module):
            yield f"--from_module: there is no module {self.from_module!r}; check the name"
        if self.from_file and Path(self.from_file).suffix.lower() not in PROMPT_FILES:
            yield f"--from_file: must be a .txt, .toml or .json file, got {self.from_file!r}"


@dataclass(frozen=True, kw_only=True)
class ImageOptions(OptionGroup, group="image", title="Images"):
    W: int | None = opt(None, "width in pixels; by default that of the model's images, e.g. 512", at_least=64)
    H: int | None = opt(None, "height in pixels; by default that of the model's images, e.g. 512", at_least=64)
    steps: int = opt(
        50, "denoising steps; by default 50, for flow models as in training's sample images", at_least=1, at_most=1000
    )
    sampler: Sampler = opt("ddim", "sampler; flow models have euler, which is their default, heun and dpmsolver++")
    scale: float = opt(7.5, "guidance scale; 1 makes no use of the negative prompt. FLUX.1: 1 if not given")
    negative_scale: float | None = opt(
        None, "own scale of the negative prompt, which an empty text then stands beside; takes half as long again"
    )
    guidance_scale: float | None = opt(None, "guidance value fed to FLUX.1 dev; 3.5 if not given")
    flow_shift: float | None = opt(None, "shift of the noise levels of flow models; their own if not given", above=0)
    batch_size: int = opt(1, "images made at a time, also of different prompts", at_least=1)
    force_scheduler_zero_steps_offset: bool = opt(
        False, "let the timesteps of ddim and pndm begin at 0 in place of 1, as models of some other trainers expect"
    )
    original_width: int | None = opt(None, "SDXL: width of the original image; that of the image if not given")
    original_height: int | None = opt(None, "SDXL: height of the original image; that of the image if not given")
    original_width_negative: int | None = opt(None, "SDXL: the same for the negative prompt")
    original_height_negative: int | None = opt(None, "SDXL: the same for the negative prompt")
    crop_top: int | None = opt(None, "SDXL: rows that were cropped from the top of the original; 0 if not given")
    crop_left: int | None = opt(None, "SDXL: columns that were cropped from its left; 0 if not given")
    pyramid_noise_prob: float | None = opt(
        None, "share of the images that begin with noise of several resolutions", at_least=0, at_most=1
    )
    pyramid_noise_discount_range: list[float] | None = opt(
        None, "lowest and highest discount of --pyramid_noise_prob; 0.8 0.8 if not given", values=2, at_least=0
    )
    noise_offset_prob: float | None = opt(
        None, "share of the images whose first noise has an offset in each channel", at_least=0, at_most=1
    )
    noise_offset_range: list[float] | None = opt(
        None, "lowest and highest strength of --noise_offset_prob; 0.1 0.1 if not given", values=2, at_least=0
    )

    def warnings(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        for name in ("guidance_scale", "flow_shift"):
            if traits is not None and traits.objective != "flow" and getattr(self, name) is not None:
                yield f"--{name}: has no effect on {traits.label}"

    def check(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        multiple = traits.pixel_multiple if traits else 1
        for name in ("W", "H"):
            side = getattr(self, name)
            if side is not None and side % multiple:
                below = side // multiple * multiple
                yield (
                    f"--{name}: must be a multiple of {multiple} with {traits.label}, got {side}; "
                    f"{below} and {below + multiple} are nearest"
                )
        for name in ("pyramid_noise_discount_range", "noise_offset_range"):
            low, high = getattr(self, name) or (0, 0)
            if low > high:
                yield f"--{name}: the lowest comes first, got {low:g} {high:g}"


@dataclass(frozen=True, kw_only=True)
class GenerationTextOptions(PromptTextOptions):
    emb_normalize_mode: Literal["original", "none", "abs"] = opt(
        "original",
        "how weights such as (word:1.2) change the whole text: original keeps the mean of its encoding, abs that of "
        "absolute values, none neither",
    )
    max_embeddings_multiples: int | None = opt(
        None, "longest prompt in units of 75 tokens: 1, 2 or 3; 1 if not given", at_least=1, at_most=3
    )
    textual_inversion_embeddings: list[str] | None = opt(
        None, "files of Textual Inversion embeddings; in prompts the file's name stands for each"
    )
    XTI_embeddings: list[str] | None = opt(
        None, "files of extended Textual Inversion, with other vectors for each layer; SD 1.x and 2.x only"
    )

    def warnings(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        if traits is not None and traits.objective == "flow":
            for name in ("clip_skip", "max_embeddings_multiples"):
                if getattr(self, name) is not None:
                    yield f"--{name}: has no effect on {traits.label}"


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(OptionGroup, group="precision", title="Memory and speed"):
    fp16: bool = opt(False, "compute in fp16; needs a GPU")
    bf16: bool = opt(False, "compute in bf16")
    xformers: bool = opt(False, "attention by the xformers package; torch's own where that does not work")
    sdpa: bool = opt(False, "attention by torch's scaled_dot_product_attention, which is also the default")
    diffusers_xformers: bool = opt(False, "the same as --xformers")
    opt_channels_last: bool = opt(False, "keep the denoiser's weights in the order channels last, which may be faster")
    vae_batch_size: float | None = opt(
        None, "images decoded at a time, below 1 as a share of --batch_size; as many as are drawn if not given", above=0
    )
    vae_slices: int | None = opt(
        None, "decode in this many slices below each other: less memory, the same image", at_least=1
    )

    def check(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        if self.fp16 and self.bf16:
            yield "--fp16: cannot be used with --bf16; use one of them"
        if self.vae_batch_size is not None and self.vae_batch_size > 1 and self.vae_batch_size % 1:
            yield f"--vae_batch_size: must be a whole number or a share below 1, got {self.vae_batch_size:g}"

    @property
    def mixed_precision(self) -> Literal["no", "fp16", "bf16"]:
        return "fp16" if self.fp16 else "bf16" if self.bf16 else "no"


@dataclass(frozen=True, kw_only=True)
class NetworksOptions(OptionGroup, group="networks", title="Networks"):
    network_module: list[str] | None = opt(
        None, "module of each network's type, as in training; files of our own types need none"
    )
    network_weights: list[str] | None = opt(None, "files of networks, such as LoRA")
    network_mul: list[float] | None = opt(None, "strength of each network; 1 where there is none")
    network_args: list[str] | None = opt(None, "further arguments of each network, as name=value;name=value")
    network_show_meta: bool = opt(False, "print the metadata of the files")
    network_merge: bool = opt(False, "merge the networks into the model: faster, their strengths stay as they are")
    network_merge_n_models: int | None = opt(None, "merge only the first N networks", at_least=0)
    network_pre_calc: bool = opt(
        False, "merge the networks, and again where a prompt changes their strengths; takes a copy of the weights"
    )
    network_regional_mask_max_color_codes: int | None = opt(
        None,
        "prompts with AND: how many parts have a color of their own in --mask_path, whose bits, red 1, green 2 and "
        "blue 4, are the part's number; without it red, green and blue are the first three parts",
        at_least=1,
        at_most=7,
    )

    def check(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        for name in self.network_module or ():
            if not find_module(resolved_module(name)):
                yield f"--network_module: there is no module {name!r}{what_to_do(name)}"
        count = len(self.network_weights or ())
        for name in ("network_module", "network_mul", "network_args"):
            if len(getattr(self, name) or ()) > count:
                yield f"--{name}: has more values than --network_weights, {count}"
        for entry in self.network_args or ():
            yield from not_pairs("--network_args", entry.split(";"))
        if self.network_merge and self.network_pre_calc:
            yield "--network_merge: cannot be used with --network_pre_calc; use one of them"

    def multipliers(self) -> tuple[float, ...]:
        """The strength of every network, in the order of --network_weights."""
        given = self.network_mul or []
        return tuple(given[n] if n < len(given) else 1.0 for n in range(len(self.network_weights or ())))

    def merged(self) -> int:
        """How many of the networks, the first ones, are merged for good."""
        count = len(self.network_weights or ())
        if self.network_merge_n_models is not None:
            return min(self.network_merge_n_models, count)
        return count if self.network_merge else 0


ANY_MODEL_GROUPS: tuple[type[OptionGroup], ...] = (
    *(PromptOptions, ImageOptions, GenerationTextOptions, PrecisionOptions, NetworksOptions, SourceOptions),
    *(HighresOptions, ControlOptions, ShrinkOptions, GradualOptions, GridOptions, OutputOptions),
    GenerationConsole,
)
OLD_GROUPS = (
    *(OldControlOptions if group is ControlOptions else group for group in ANY_MODEL_GROUPS),
    OldGuidanceOptions,
)
