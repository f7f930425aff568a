"""Which FLUX.1 a model is, by names and shapes alone: no torch, so that mistakes are found at once."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.families.flux.keymap import AE, ENCODERS, PREFIX
from library.families.flux.spec import FLUX, FOLDERS, IN_CHANNELS
from library.families.shared.recognition import (
    controlnet_problem,
    file_shapes,
    path_problem,
    pipeline_kind,
    read_json,
    recognise,
    unsupported,
    vae_problem,
)
from library.families.shared.t5 import is_t5

if TYPE_CHECKING:
    from library.options.base import Options

Shapes = Mapping[str, tuple[int, ...]]

ORIGINAL_CODE = "https://github.com/black-forest-labs/flux"
FLAGS = {"te1": "clip_l", "te3": "t5xxl"}  # the option that gives an encoder's file
TITLES = {"te1": "CLIP-L", "te3": "T5"}
TOKENIZERS = {"te1": "tokenizer", "te3": "tokenizer_2"}
CLIP_MARKER_KEY = "encoder.layers.0.mlp.fc1.weight"
DIFFUSERS_MARKER_KEY = "transformer_blocks.0.attn.add_k_proj.bias"
_NO_MODEL = "--pretrained_model_name_or_path: name a model: a file, a Diffusers folder or a hub id"
SPECIAL_CHANNELS = {  # in patches of 2 x 2 as well -> what such a model is
    2 * IN_CHANNELS: "a FLUX.1 for control images, such as Canny or Depth",  # the latents of one image more
    384: "FLUX.1 Fill",  # the latents of the masked image, and a mask of the image's size
}
HEAD_UNIT = 32  # rotary axes take 1/8, 7/16 and 7/16 of a head's width, in pairs


def mismatch(keys: Iterable[str]) -> str | None:
    """Why a file with these keys is not the model that is asked for; None when it is."""
    keys = list(keys)
    kind = recognise(keys)
    return unsupported(keys, kind) if kind == FLUX else f"this is {kind}; a FLUX.1 model is needed here"


def folder_problem(path: Path) -> str | None:
    """Why a Diffusers folder is not the model that is asked for; None when it is. Raises: UserError: broken JSON."""
    kind = pipeline_kind(path)
    if kind not in (None, FLUX):
        return f"this is {kind}; a FLUX.1 model is needed here"
    config = path / "transformer" / "config.json"
    if not config.is_file():
        return "not a Diffusers model folder of FLUX.1: transformer/config.json is missing"
    content = read_json(config)
    name = content.get("_class_name")
    if name != "FluxTransformer2DModel":
        return f"its transformer is a {name}; a FLUX.1 model is needed here"
    return channels_problem(content.get("in_channels", IN_CHANNELS))


def channels_problem(channels: int) -> str | None:
    """The problem of a denoiser with this many input channels per patch, or None."""
    if channels == IN_CHANNELS:
        return None
    what = SPECIAL_CHANNELS.get(channels, "a FLUX.1 for filling in or for control images")
    return f"its input has {channels} channels instead of {IN_CHANNELS}: this is {what}, which cannot be used here"


def check_paths(opts: Options) -> list[str]:
    """Every problem with the paths of model, text encoders and autoencoder that can be seen without loading anything.

    Reads only the headers of .safetensors files and the small JSON files of Diffusers folders.
    """
    if not opts.model.pretrained_model_name_or_path:
        return [_NO_MODEL]
    problems = [*_text_problems(opts), opts.family.ae and path_problem("--ae", opts.family.ae, _ae_problem)]
    problems.append(controlnet_problem(opts, "FluxControlNetModel"))
    return [problem for problem in problems if problem] or _missing_parts(opts, (*FLAGS, "vae"))


def check_text_paths(opts: Options) -> list[str]:
    """`check_paths` for texts alone: without an autoencoder, and without a model where all text encoders are named."""
    named = [part for part, option in FLAGS.items() if getattr(opts.family, option)]
    if opts.model.pretrained_model_name_or_path:
        return _text_problems(opts) or _missing_parts(opts, tuple(FLAGS))
    if not named:
        return [f"{_NO_MODEL}; or its text encoders, with {' and '.join(f'--{option}' for option in FLAGS.values())}"]
    lacking = [f"--{option}: needed where no model is named" for part, option in FLAGS.items() if part not in named]
    if not opts.family.t5xxl_max_token_length:
        lacking.append("--t5xxl_max_token_length: needed where no model is named; 512 as for dev, 256 as for schnell")
    return _text_problems(opts) + lacking


def _text_problems(opts: Options) -> list[str]:
    """Problems with the paths of model and text encoders that are named."""

    def of_model(path: Path) -> str | None:
        if path.is_dir():
            return folder_problem(path)
        shapes = file_shapes(path)
        if shapes is None:
            return None
        return mismatch(shapes) or channels_problem(flux_shape(shapes).in_channels)

    def of_encoder(path: Path, part: str) -> str | None:
        shapes = file_shapes(path)
        return None if shapes is None else encoder_problem(shapes, part)

    name = opts.model.pretrained_model_name_or_path
    problems = [path_problem("--pretrained_model_name_or_path", name, of_model)] if name else []
    for part, option in FLAGS.items():
        file = getattr(opts.family, option)
        if file:
            problems.append(path_problem(f"--{option}", file, partial(of_encoder, part=part)))
    return [problem for problem in problems if problem]


def _ae_problem(path: Path) -> str | None:
    shapes = file_shapes(path) or {}
    if recognise(shapes) == FLUX:
        inside = any(key.startswith(AE) for key in shapes)
        return None if inside else "this is FLUX's transformer; its autoencoder, ae.safetensors, is needed here"
    return vae_problem(path, (FLUX,))


def _missing_parts(opts: Options, needed: Collection[str]) -> list[str]:
    """A line for each of the `needed` parts that neither the model nor an option gives."""
    path, family = Path(opts.model.pretrained_model_name_or_path), opts.family
    if path.is_dir():
        inside = {part for part, folder in (*FOLDERS.items(), ("vae", "vae")) if (path / folder).is_dir()}
    elif path.is_file():
        keys = file_shapes(path)
        if keys is None:
            return []
        inside = {part for part in ENCODERS if encoder_prefix(keys, part, inside=True) is not None}
        inside |= {"vae"} if any(key.startswith(AE) for key in keys) else set()
    else:
        return []
    names = {**{part: (FLAGS[part], TITLES[part]) for part in FLAGS}, "vae": ("ae", "autoencoder")}
    lacking = [names[part] for part in needed if part not in inside and not getattr(family, names[part][0])]
    return [f"--{flag}: needed, as {path} holds no {title}" for flag, title in lacking]


# --- text encoders ----------------------------------------------------------------------------------------------------


def encoder_prefix(keys: Iterable[str], part: str, *, inside: bool = False) -> str | None:
    """The prefix of an encoder's transformers names in a file; None: the file has no such encoder.

    Args:
        inside: the file is a whole model's, in which an encoder has a prefix.
    """
    keys = set(keys)
    for prefix in (ENCODERS[part],) if inside else (ENCODERS[part], ""):
        names = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        if is_t5(names) if part == "te3" else names & {CLIP_MARKER_KEY, f"text_model.{CLIP_MARKER_KEY}"}:
            return prefix
    return None


def encoder_problem(keys: Iterable[str], part: str) -> str | None:
    """Why a file with these keys is not the encoder that is asked for; None when it is."""
    keys = list(keys)
    if encoder_prefix(keys, part) is not None:
        return None
    return f"this is {recognise(keys)}; {TITLES[part]} in transformers' layout is needed here"


# --- the denoiser -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FluxShape:
    """The architecture of a denoiser in a single file, by its names and shapes."""

    prefix: str  # before its names
    diffusers: bool  # whether its names are diffusers' own
    width: int
    head_width: int
    double: int  # blocks with two streams
    single: int  # blocks with one stream
    in_channels: int
    context: int  # width of T5's states
    pooled: int  # width of CLIP's vector
    guidance: bool  # whether it has a guidance embedding: dev has, schnell has not

    def diffusers_config(self) -> dict[str, Any]:
        """FluxTransformer2DModel's arguments. Raises: UserError: heads of a width that rotary axes cannot share."""
        if self.head_width % HEAD_UNIT or self.width % self.head_width:
            raise UserError(
                f"the model's width, {self.width}, and that of its heads, {self.head_width}, do not fit FLUX.1, whose "
                f"heads are multiples of {HEAD_UNIT} wide"
            )
        return {
            "in_channels": self.in_channels,
            "num_layers": self.double,
            "num_single_layers": self.single,
            "attention_head_dim": self.head_width,
            "num_attention_heads": self.width // self.head_width,
            "joint_attention_dim": self.context,
            "pooled_projection_dim": self.pooled,
            "guidance_embeds": self.guidance,
            "axes_dims_rope": (self.head_width // 8, self.head_width * 7 // 16, self.head_width * 7 // 16),
        }


_ORIGINAL = {
    "in": "img_in",
    "context": "txt_in",
    "pooled": "vector_in.in_layer",
    "guidance": "guidance_in.in_layer",
    "double": "double_blocks",
    "single": "single_blocks",
    "norm": (
        "double_blocks.0.img_attn.norm.query_norm.scale",
        "single_blocks.0.norm.query_norm.scale",
    ),
}
_DIFFUSERS = {
    "in": "x_embedder",
    "context": "context_embedder",
    "pooled": "time_text_embed.text_embedder.linear_1",
    "guidance": "time_text_embed.guidance_embedder.linear_1",
    "double": "transformer_blocks",
    "single": "single_transformer_blocks",
    "norm": ("transformer_blocks.0.attn.norm_q.weight", "single_transformer_blocks.0.attn.norm_q.weight"),
}


def flux_shape(shapes: Shapes) -> FluxShape:
    """Reads the denoiser's architecture from a whole file's shapes.

    Raises: UserError: the names are not those of a denoiser of this family.
    """
    prefix = PREFIX if any(key.startswith(PREFIX) for key in shapes) else ""
    inside = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    diffusers = DIFFUSERS_MARKER_KEY in inside
    names: dict[str, Any] = _DIFFUSERS if diffusers else _ORIGINAL
    try:
        width, in_channels = inside[f"{names['in']}.weight"]
        norm = next((inside[name] for name in names["norm"] if name in inside), None)
        if norm is None:
            raise KeyError(names["norm"][0])
        return FluxShape(
            prefix=prefix,
            diffusers=diffusers,
            width=width,
            head_width=norm[0],
            double=_depth(inside, names["double"]),
            single=_depth(inside, names["single"]),
            in_channels=in_channels,
            context=inside[f"{names['context']}.weight"][1],
            pooled=inside[f"{names['pooled']}.weight"][1],
            guidance=f"{names['guidance']}.weight" in inside,
        )
    except KeyError as error:
        raise UserError(f"the model lacks the tensor {prefix}{error.args[0]}") from None


def _depth(shapes: Shapes, blocks: str) -> int:
    numbers = [int(match[1]) for key in shapes if (match := re.match(rf"{blocks}\.(\d+)\.", key))]
    return 1 + max(numbers, default=-1)


def model_facts(variant: str) -> dict[str, Any]:
    """`Writer.metadata` of a model, without the options of a training."""
    return {
        "ss_v2": False,
        "ss_base_model_version": "flux1",
        "modelspec.architecture": f"flux-1-{variant}",
        "modelspec.implementation": ORIGINAL_CODE,
        "modelspec.resolution": "1024x1024",
    }


def variant(guidance: bool) -> str:
    """`dev` or `schnell`: with or without a guidance embedding."""
    return "dev" if guidance else "schnell"
