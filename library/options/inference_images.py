"""More options of the scripts that generate images: images that go in, ways of drawing, and files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from library.options.base import OptionGroup, Options, opt
from library.options.network import find_module
from library.options.optimizer import not_pairs

if TYPE_CHECKING:
    from library.types import FamilyTraits

CANNY = re.compile(r"canny(?:_(\d{1,3})_(\d{1,3}))?")  # a value of --control_net_preps, with its limits


@dataclass(frozen=True, kw_only=True)
class SourceOptions(OptionGroup, group="source", title="Images to begin with"):
    image_path: str | None = opt(None, "image to begin with, or a folder of such: one for each image that is made")
    mask_path: str | None = opt(
        None,
        "mask of --image_path, or a folder of them: bright parts are drawn again, dark ones are kept. For prompts with "
        "AND, the regions of their parts",
    )
    strength: float | None = opt(
        None,
        "how far images to begin with are changed: the share of the steps; 0.8 if not given",
        at_least=0,
        at_most=1,
    )
    guide_image_path: list[str] | None = opt(
        None,
        "images that guide: for ControlNets or a control LoRA, one for each, or folders; else one for "
        "--clip_vision_strength",
    )
    clip_vision_strength: float | None = opt(
        None,
        "SDXL: strength of an image as CLIP sees it, in place of the pooled text: --guide_image_path, or --image_path",
    )
    clip_vision_model: str = opt(
        "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
        "CLIP vision model of --clip_vision_strength: a folder, or a hub id",
        only_with=("clip_vision_strength",),
    )

    def check(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        if self.strength is not None and not self.image_path and not opts.highres.highres_fix_scale:
            yield "--strength: needs --image_path, the image to begin with"
        if self.clip_vision_strength is not None and not self.image_path and not self.guide_image_path:
            yield "--clip_vision_strength: needs --guide_image_path, or --image_path, the image that CLIP sees"

    def warnings(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        if traits is not None and self.clip_vision_strength is not None and not traits.pooled_by_image:
            yield f"--clip_vision_strength: has no effect on {traits.label}"


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
    control_net_lllite_models: list[str] | None = opt(
        None, "SDXL: files of ControlNet-LLLite, in place of --control_net_models"
    )
    control_net_models: list[str] | None = opt(None, "ControlNets: files, Diffusers folders or hub ids")
    control_net_preps: list[str] | None = opt(
        None, "preparation of each guide image: none, canny, or canny with its limits as in canny_63_191"
    )
    control_net_multipliers: list[float] | None = opt(None, "strength of each ControlNet; 1 where there is none")
    control_net_ratios: list[float] | None = opt(
        None, "share of the steps, from the first on, in which each ControlNet acts; 1 where there is none",
        at_least=0, at_most=1,
    )  # fmt: skip

    @property
    def nets(self) -> tuple[str, list[str]]:
        """The option that names the networks which read guide images, and what it names."""
        if self.control_net_lllite_models:
            return "--control_net_lllite_models", self.control_net_lllite_models
        return "--control_net_models", self.control_net_models or []

    def check(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        option, count = self.nets[0], len(self.nets[1])
        if self.control_net_lllite_models and self.control_net_models:
            yield "--control_net_lllite_models: cannot be used with --control_net_models; use one of them"
        for name in self.control_net_preps or ():
            if name != "none" and not CANNY.fullmatch(name):
                yield f"--control_net_preps: {name!r} is no preparation; use none, canny, or canny_63_191"
        for name in ("control_net_preps", "control_net_multipliers", "control_net_ratios"):
            # A control LoRA reads a guide image, too, and has a strength in --network_mul.
            if len(getattr(self, name) or ()) > (count or (name == "control_net_preps")):
                yield f"--{name}: has more values than {option}, {count}"
        guides = len(opts.source.guide_image_path or ())
        if guides > max(count, 1):
            yield f"--guide_image_path: has more values than {option}, {count}"
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

    clip_guidance_scale: float = opt(0.0, "strength of guidance by CLIP; refused above 0")
    clip_image_guidance_scale: float = opt(0.0, "strength of guidance by CLIP and an image; refused above 0")
    vgg16_guidance_scale: float = opt(0.0, "strength of guidance by VGG16 and an image; refused above 0")
    vgg16_guidance_layer: int = opt(20, "layer of VGG16; has no effect")

    def check(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        for name in ("clip_guidance_scale", "clip_image_guidance_scale", "vgg16_guidance_scale"):
            if getattr(self, name):
                yield f"--{name}: {_DROPPED}"


@dataclass(frozen=True, kw_only=True)
class ShrinkOptions(OptionGroup, group="shrink", title="Deep Shrink"):
    ds_depth_1: int | None = opt(
        None,
        "input block of the U-Net before which its features are made smaller, such as 3: of 0 to 11, with SDXL 0 to 8",
        at_least=0,
    )
    ds_timesteps_1: int = opt(650, "until this timestep, counted down from 1000", at_least=0, at_most=1000)
    ds_depth_2: int | None = opt(
        None, "a second input block, from --ds_timesteps_1 down to --ds_timesteps_2", at_least=0
    )
    ds_timesteps_2: int = opt(650, "until this timestep, below --ds_timesteps_1", at_least=0, at_most=1000)
    ds_ratio: float = opt(0.5, "how small features are made: this share of their sides", above=0, at_most=1)

    def warnings(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        if self.ds_depth_1 is None:
            for name in sorted(self.__dataclass_fields__.keys() & opts.explicit):
                yield f"--{name}: has no effect without --ds_depth_1, but on prompts with Deep Shrink of their own"
        elif self.ds_depth_2 is not None and self.ds_timesteps_2 >= self.ds_timesteps_1:
            yield "--ds_depth_2: has no effect, as --ds_timesteps_2 is not below --ds_timesteps_1"


@dataclass(frozen=True, kw_only=True)
class GradualOptions(OptionGroup, group="gradual", title="Gradual Latent"):
    gradual_latent_timesteps: int | None = opt(
        None,
        "begin with small latents, and enlarge them below this timestep, such as 750; with --sampler euler_a or euler",
        at_least=0,
        at_most=1000,
    )
    gradual_latent_ratio: float = opt(0.5, "how small they are at the beginning", above=0, at_most=1)
    gradual_latent_ratio_step: float = opt(0.125, "by how much each enlargement raises that", above=0, at_most=1)
    gradual_latent_every_n_steps: int = opt(3, "steps between two enlargements", at_least=1)
    gradual_latent_s_noise: float = opt(1.0, "strength of the noise that enlarged latents get", at_least=0)
    gradual_latent_unsharp_params: str | None = opt(
        None,
        "sharpening of enlarged latents: size, sigma, strength, and 1 to sharpen what a step gives or 0 for what it "
        "begins with, as in 3,0.5,0.5,1 or 3,1,1,0",
        comma_list=True,
    )

    def warnings(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        if self.gradual_latent_timesteps is None:
            for name in sorted(self.__dataclass_fields__.keys() & opts.explicit):
                yield (
                    f"--{name}: has no effect without --gradual_latent_timesteps, but on prompts with Gradual Latent "
                    "of their own"
                )


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
