"""The options of the scripts that generate images, but for the model's files, which its family knows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library.options.base import OptionGroup, Options, opt
from library.options.logging import ConsoleOptions
from library.options.network import find_module, resolved_module
from library.options.optimizer import not_pairs
from library.options.sampling import PromptTextOptions, Sampler
from library.runtime.packages import remedy

if TYPE_CHECKING:
    from library.types import FamilyTraits

CANNY = re.compile(r"canny(?:_(\d{1,3})_(\d{1,3}))?")  # a value of --control_net_preps, with its limits
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
        None, "decode in tiles, this many below each other: less memory, nearly the same image", at_least=1
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
        None, "number of regions that the mask of regional prompts distinguishes by colour", at_least=1
    )

    def check(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        for name in self.network_module or ():
            if not find_module(resolved_module(name)):
                what_to_do = remedy(name.split(".")[0]) or "check the name, or install its package"
                yield f"--network_module: there is no module {name!r}; {what_to_do}"
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


@dataclass(frozen=True, kw_only=True)
class SourceOptions(OptionGroup, group="source", title="Images to begin with"):
    image_path: str | None = opt(None, "image to begin with, or a folder of such: one for each image that is made")
    mask_path: str | None = opt(
        None, "mask of --image_path, or a folder of them: bright parts are drawn again, dark ones are kept"
    )
    strength: float | None = opt(
        None,
        "how far images to begin with are changed: the share of the steps; 0.8 if not given",
        at_least=0,
        at_most=1,
    )
    guide_image_path: list[str] | None = opt(None, "images that guide: for ControlNets, one for each, or folders")
    clip_vision_strength: float | None = opt(None, "SDXL: strength of the guide image as seen by CLIP")

    def check(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        if self.strength is not None and not self.image_path and not opts.highres.highres_fix_scale:
            yield "--strength: needs --image_path, the image to begin with"
        if self.mask_path and not self.image_path:
            yield "--mask_path: regions of a prompt are not available yet; with --image_path a mask is"


@dataclass(frozen=True, kw_only=True)
class HighresOptions(OptionGroup, group="highres", title="Highres fix"):
    highres_fix_scale: float | None = opt(
        None, "draw images first at this share of their size, enlarge them, and draw them again", above=0, at_most=1
    )
    highres_fix_steps: int = opt(28, "steps of the first drawing", at_least=1, at_most=1000)
    highres_fix_strength: float | None = opt(
        None, "--strength of the first drawing, with --image_path; --strength if not given", at_least=0, at_most=1
    )
    highres_fix_save_1st: bool = opt(False, "save the first images too")
    highres_fix_latents_upscaling: bool = opt(False, "enlarge latents (bicubic) in place of images (Lanczos)")
    highres_fix_upscaler: str | None = opt(
        None, "module that enlarges: its create_upscaler gives an object with upscale(images, width, height)"
    )
    highres_fix_upscaler_args: str | None = opt(None, "arguments of that module, as name=value;name=value")
    highres_fix_disable_control_net: bool = opt(False, "draw again without ControlNets")

    def check(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        name = self.highres_fix_upscaler
        if name and not find_module(name):
            yield f"--highres_fix_upscaler: there is no module {name!r}; check the name"
        if name and self.highres_fix_latents_upscaling:
            yield "--highres_fix_upscaler: cannot be used with --highres_fix_latents_upscaling; use one of them"
        if self.highres_fix_upscaler_args:
            yield from not_pairs("--highres_fix_upscaler_args", self.highres_fix_upscaler_args.split(";"))

    def warnings(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        for name in self.__dataclass_fields__ if self.highres_fix_scale is None else ():
            if name in opts.explicit and name != "highres_fix_scale":
                yield f"--{name}: has no effect without --highres_fix_scale"


@dataclass(frozen=True, kw_only=True)
class ControlOptions(OptionGroup, group="control", title="ControlNets"):
    control_net_lllite_models: list[str] | None = opt(None, "files of ControlNet-LLLite")
    control_net_models: list[str] | None = opt(None, "ControlNets: files, Diffusers folders or hub ids")
    control_net_preps: list[str] | None = opt(
        None, "preparation of each guide image: none, canny, or canny with its limits as in canny_63_191"
    )
    control_net_multipliers: list[float] | None = opt(None, "strength of each ControlNet; 1 where there is none")
    control_net_ratios: list[float] | None = opt(
        None, "share of the steps, from the first on, in which each ControlNet acts; 1 where there is none",
        at_least=0, at_most=1,
    )  # fmt: skip

    def check(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        count = len(self.control_net_models or ())
        for name in self.control_net_preps or ():
            if name != "none" and not CANNY.fullmatch(name):
                yield f"--control_net_preps: {name!r} is no preparation; use none, canny, or canny_63_191"
        for name in ("control_net_preps", "control_net_multipliers", "control_net_ratios"):
            if len(getattr(self, name) or ()) > count:
                yield f"--{name}: has more values than --control_net_models, {count}"
        guides = len(opts.source.guide_image_path or ())
        if guides > max(count, 0):
            yield f"--guide_image_path: has more values than --control_net_models, {count}"
        elif 1 < guides < count:
            yield f"--guide_image_path: give one for all {count} ControlNets, or one for each, got {guides}"


@dataclass(frozen=True, kw_only=True)
class OldControlOptions(ControlOptions, without=("control_net_lllite_models",)):
    control_net_weights: list[float] | None = opt(
        None, "the same as --control_net_multipliers", alias_of="control_net_multipliers"
    )


_DROPPED = "not supported; guidance by another network is no longer offered"


@dataclass(frozen=True, kw_only=True)
class OldGuidanceOptions(OptionGroup, group="old_guidance", title="Guidance by other networks"):
    """What one script only has offered."""

    XTI_embeddings: list[str] | None = opt(None, "files of extended Textual Inversion; refused")
    clip_guidance_scale: float = opt(0.0, "strength of guidance by CLIP; refused above 0")
    clip_image_guidance_scale: float = opt(0.0, "strength of guidance by CLIP and an image; refused above 0")
    vgg16_guidance_scale: float = opt(0.0, "strength of guidance by VGG16 and an image; refused above 0")
    vgg16_guidance_layer: int = opt(20, "layer of VGG16; has no effect")

    def check(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        if self.XTI_embeddings:
            yield "--XTI_embeddings: not supported; --textual_inversion_embeddings takes plain embeddings"
        for name in ("clip_guidance_scale", "clip_image_guidance_scale", "vgg16_guidance_scale"):
            if getattr(self, name):
                yield f"--{name}: {_DROPPED}"


@dataclass(frozen=True, kw_only=True)
class ShrinkOptions(OptionGroup, group="shrink", title="Deep Shrink"):
    ds_depth_1: int | None = opt(
        None, "input block of the U-Net before which its features are made smaller", at_least=0
    )
    ds_timesteps_1: int = opt(650, "until this timestep, counted down from 1000", at_least=0, at_most=1000)
    ds_depth_2: int | None = opt(None, "a second input block, for the timesteps after those of the first", at_least=0)
    ds_timesteps_2: int = opt(650, "until this timestep", at_least=0, at_most=1000)
    ds_ratio: float = opt(0.5, "how much smaller", above=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class GradualOptions(OptionGroup, group="gradual", title="Gradual Latent"):
    gradual_latent_timesteps: int | None = opt(
        None, "begin with small latents, and enlarge them from this timestep on", at_least=0, at_most=1000
    )
    gradual_latent_ratio: float = opt(0.5, "how small they are at the beginning", above=0, at_most=1)
    gradual_latent_ratio_step: float = opt(0.125, "by how much each enlargement raises that", above=0, at_most=1)
    gradual_latent_every_n_steps: int = opt(3, "steps between two enlargements", at_least=1)
    gradual_latent_s_noise: float = opt(1.0, "strength of the noise that enlarged latents get", at_least=0)
    gradual_latent_unsharp_params: str | None = opt(
        None, "sharpening of enlarged latents: size, sigma, strength, and 1 for what is predicted, as in 3,0.5,0.5,1",
        comma_list=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OutputOptions(OptionGroup, group="output", title="Files"):
    outdir: str = opt("outputs", "folder of the images; made if missing")
    sequential_file_name: bool = opt(False, "number the images, im_000001.png and so on, going on after those there")
    use_original_file_name: bool = opt(False, "name each image after the one that it begins with")
    image_format: Literal["png", "jpg", "webp"] = opt("png", "format of the files")


@dataclass(frozen=True, kw_only=True)
class GridOptions(OptionGroup, group="grid", title="Grid"):
    grid: list[str] | None = opt(
        None,
        "draw the product of settings: name=value,value each, of network_weights (patterns such as out/*.safetensors), "
        "network_mul, seed, scale, sampler, steps and prompt (a text, or a file with a line each); gives labelled "
        "sheets and index.html",
    )

    def check(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        if not self.grid:
            return
        for name in ("from_file", "from_module", "interactive", "shuffle_prompts", "iter_same_seed"):
            if getattr(opts.prompts, name):
                yield f"--grid: cannot be used with --{name}; give one --prompt, or prompt= as an axis"
        for name in ("n_iter", "images_per_prompt"):
            if getattr(opts.prompts, name) > 1:
                yield f"--grid: cannot be used with --{name}; give several seeds as an axis, as in seed=1,2,3"
        if opts.networks.network_pre_calc:
            yield "--grid: cannot be used with --network_pre_calc"


# Options that are known, and their values which ask for nothing; any other is refused until they are there.
_NOT_YET: dict[str, Any] = {
    "clip_vision_strength": None,
    "control_net_lllite_models": None,
    "ds_depth_1": None,
    "ds_depth_2": None,
    "gradual_latent_timesteps": None,
    "network_regional_mask_max_color_codes": None,
}


def not_available(options: dict[str, Any]) -> Iterable[str]:
    """A line for each option that is given and not available yet."""
    for name, neutral in _NOT_YET.items():
        if options.get(name, neutral) != neutral:
            yield f"--{name}: not available yet"


ANY_MODEL_GROUPS: tuple[type[OptionGroup], ...] = (
    *(PromptOptions, ImageOptions, GenerationTextOptions, PrecisionOptions, NetworksOptions, SourceOptions),
    *(HighresOptions, ControlOptions, ShrinkOptions, GradualOptions, GridOptions, OutputOptions),
    GenerationConsole,
)
OLD_GROUPS = (
    *(OldControlOptions if group is ControlOptions else group for group in ANY_MODEL_GROUPS),
    OldGuidanceOptions,
)
