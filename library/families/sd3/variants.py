"""Which Stable Diffusion 3 a model is, by names and shapes alone: no torch, so that mistakes are found at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.families.sd3.keymap import ENCODERS, MMDIT
from library.families.sd3.spec import FOLDERS, SD3
from library.families.shared.recognition import (
    controlnet_problem,
    file_shapes,
    path_problem,
    pipeline_kind,
    read_json,
    recognise,
    recognise_file,
    vae_problem,
)
from library.families.shared.t5 import is_t5
from library.families.shared.vae import missing_vae

if TYPE_CHECKING:
    from library.families.spec import ModelKind
    from library.options.base import Options

Shapes = Mapping[str, tuple[int, ...]]

ORIGINAL_CODE = "https://github.com/Stability-AI/generative-models"
HEAD_WIDTH = 64  # of every published MMDiT
FLAGS = {"te1": "clip_l", "te2": "clip_g", "te3": "t5xxl"}  # the option that gives an encoder's file
TITLES = {"te1": "CLIP-L", "te2": "CLIP-G", "te3": "T5"}
TOKENIZERS = {"te1": "tokenizer", "te2": "tokenizer_2", "te3": "tokenizer_3"}
_NO_MODEL = "--pretrained_model_name_or_path: name a model: a file, a Diffusers folder or a hub id"
CLIP_MARKER_KEY = "text_model.encoder.layers.0.mlp.fc1.weight"
CLIP_L_WIDTH, CLIP_G_WIDTH = 768, 1280  # of the published encoders


def mismatch(kind: ModelKind) -> str | None:
    """Why a file of this kind is not the model that is asked for; None when it is."""
    return None if kind == SD3 else f"this is {kind}; a Stable Diffusion 3 or 3.5 model is needed here"


def folder_problem(path: Path) -> str | None:
    """Why a Diffusers folder is not the model that is asked for; None when it is. Raises: UserError: broken JSON."""
    kind = pipeline_kind(path)
    if kind not in (None, SD3):
        return mismatch(kind)
    config = path / "transformer" / "config.json"
    if not config.is_file():
        return "not a Diffusers model folder of Stable Diffusion 3: transformer/config.json is missing"
    name = read_json(config).get("_class_name")
    if name != "SD3Transformer2DModel":
        return f"its transformer is a {name}; a Stable Diffusion 3 or 3.5 model is needed here"
    return None


def check_paths(opts: Options) -> list[str]:
    """Every problem with the paths of model, text encoders and VAE that can be seen without loading anything.

    Reads only the headers of .safetensors files and the small JSON files of Diffusers folders.
    """
    if not opts.model.pretrained_model_name_or_path:
        return [_NO_MODEL]
    vae = opts.model.vae and path_problem("--vae", opts.model.vae, lambda path: vae_problem(path, (SD3,)))
    net = controlnet_problem(opts, "SD3ControlNetModel")
    problems = [problem for problem in (*_text_problems(opts), vae, net) if problem]
    parts = None if problems else _parts_of(opts)
    if parts is None:
        return problems
    if "vae" not in parts:
        path = opts.model.pretrained_model_name_or_path
        problems.append(f"--vae: missing, and {path} brings no VAE of its own")
    if not opts.text_cache.cache_text_encoder_outputs_to_disk:  # all captions' outputs may lie beside the images
        problems += missing_encoders(opts)
    asked = {"train_t5xxl": opts.method.train_t5xxl}
    if opts.method.trains_model:  # a network has no use for it, and says so
        asked["save_t5xxl"] = opts.family.save_t5xxl
    if "te3" not in parts:
        problems += [
            f"--{name}: the model brings no T5; give its file with --t5xxl" for name, given in asked.items() if given
        ]
    return problems


def check_text_paths(opts: Options) -> list[str]:
    """`check_paths` for texts alone: without a VAE, and without a model where all text encoders are named.

    Text encoders that a model lacks are in `missing_encoders`: all captions' outputs may be there already.
    """
    lacking = []
    if not opts.model.pretrained_model_name_or_path:
        unnamed = [option for option in FLAGS.values() if not getattr(opts.family, option)]
        lacking = [f"--{option}: needed where no model is named" for option in unnamed]
        if len(lacking) == len(FLAGS):
            return [f"{_NO_MODEL}; or its text encoders, with {', '.join(f'--{option}' for option in FLAGS.values())}"]
    return _text_problems(opts) + lacking


def _text_problems(opts: Options) -> list[str]:
    """Problems with the paths of model and text encoders that are named."""

    def of_model(path: Path) -> str | None:
        if path.is_dir():
            return folder_problem(path)
        kind = recognise_file(path)
        return None if kind is None else mismatch(kind)

    def of_encoder(path: Path, part: str) -> str | None:
        if path.is_dir():
            return "is a folder; the encoder's file is needed here"
        shapes = file_shapes(path)
        return None if shapes is None else encoder_problem(shapes, part)

    name = opts.model.pretrained_model_name_or_path
    problems = [path_problem("--pretrained_model_name_or_path", name, of_model)] if name else []
    for part, option in FLAGS.items():
        file = getattr(opts.family, option)
        if file:
            problems.append(path_problem(f"--{option}", file, partial(of_encoder, part=part)))
    return [problem for problem in problems if problem]


def missing_encoders(opts: Options) -> list[str]:
    """The messages about CLIP text encoders that are needed and not there, as far as can be seen."""
    parts = _parts_of(opts)
    return [] if parts is None else [missing_encoder(part) for part in ("te1", "te2") if part not in parts]


def _parts_of(opts: Options) -> set[str] | None:
    """Text encoders, and "vae", that the model and options give; None: only loading shows what the model has."""
    name = opts.model.pretrained_model_name_or_path
    path = Path(name or "")
    if not name:
        inside = set()
    elif path.is_dir():
        inside = {part for part, folder in (*FOLDERS.items(), ("vae", "vae")) if (path / folder).is_dir()}
    elif path.is_file():
        keys = file_shapes(path)
        if keys is None:
            return None
        inside = {part for part in ENCODERS if encoder_prefix(keys, part, inside=True) is not None}
        inside |= set() if missing_vae(keys) else {"vae"}
    else:
        return None
    given = {part for part, option in FLAGS.items() if getattr(opts.family, option)}
    return inside | given | ({"vae"} if opts.model.vae else set())


def missing_encoder(part: str) -> str:
    """The message about a CLIP text encoder that is needed and not there."""
    return f"--{FLAGS[part]}: missing, and the model brings no {TITLES[part]}; texts cannot be encoded without it"


# --- text encoders ----------------------------------------------------------------------------------------------------


def encoder_prefix(keys: Iterable[str], part: str, *, inside: bool = False) -> str | None:
    """The prefix of an encoder's transformers names in a file; None: the file has no such encoder.

    Args:
        inside: the file is a whole model's, in which an encoder has a prefix.
    """
    keys = set(keys)
    for prefix in (ENCODERS[part],) if inside else (ENCODERS[part], ""):
        names = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        if is_t5(names) if part == "te3" else CLIP_MARKER_KEY in names:
            return prefix
    return None


def encoder_problem(shapes: Shapes, part: str) -> str | None:
    """Why a file is not the encoder that is asked for; None when it is."""
    prefix = encoder_prefix(shapes, part)
    if prefix is None:
        return f"this is {recognise(shapes)}; {TITLES[part]} in transformers' layout is needed here"
    if part == "te3":
        return None
    width = shapes[f"{prefix}{CLIP_MARKER_KEY}"][1]
    other = {("te1", CLIP_G_WIDTH): "te2", ("te2", CLIP_L_WIDTH): "te1"}.get((part, width))
    return other and f"this is {TITLES[other]}; give it with --{FLAGS[other]}"


# --- the denoiser -----------------------------------------------------------------------------------------------------


def mmdit_prefix(keys: Iterable[str]) -> str:
    """The prefix of the denoiser's names; it may be empty in files of the denoiser alone."""
    return MMDIT if any(key.startswith(MMDIT) for key in keys) else ""


@dataclass(frozen=True)
class MmditShape:
    """The architecture of a denoiser in a single file, by its names and shapes."""

    width: int
    depth: int  # blocks
    patch: int
    in_channels: int
    out_channels: int
    context: int  # width of the text states
    pooled: int
    table: int  # entries on a side of the table of positions
    dual: tuple[int, ...]  # blocks with a second attention of the image with itself
    qk_norm: bool

    def diffusers_config(self) -> dict[str, Any]:
        """SD3Transformer2DModel's arguments. Raises: UserError: the width does not divide into heads."""
        if self.width % HEAD_WIDTH:
            raise UserError(f"the model's width, {self.width}, is not a multiple of {HEAD_WIDTH}, the width of a head")
        return {
            "sample_size": min(128, self.table * self.patch),
            "patch_size": self.patch,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "num_layers": self.depth,
            "attention_head_dim": HEAD_WIDTH,
            "num_attention_heads": self.width // HEAD_WIDTH,
            "joint_attention_dim": self.context,
            "caption_projection_dim": self.width,
            "pooled_projection_dim": self.pooled,
            "pos_embed_max_size": self.table,
            "dual_attention_layers": self.dual,
            "qk_norm": "rms_norm" if self.qk_norm else None,
        }


def mmdit_shape(shapes: Shapes, prefix: str = MMDIT) -> MmditShape:
    """Reads the denoiser's architecture from a file's shapes.

    Raises: UserError: the names are not those of a denoiser of this family.
    """
    inside = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    try:
        width, in_channels, patch, _ = inside["x_embedder.proj.weight"]
        numbers = {int(match[1]) for key in inside if (match := re.match(r"joint_blocks\.(\d+)\.", key))}
        table = isqrt(inside["pos_embed"][1])
        if table * table != inside["pos_embed"][1]:
            raise UserError(f"the table of positions has {inside['pos_embed'][1]} entries, which make no square")
        return MmditShape(
            width=width,
            depth=1 + max(numbers),
            patch=patch,
            in_channels=in_channels,
            out_channels=inside["final_layer.linear.weight"][0] // (patch * patch),
            context=inside["context_embedder.weight"][1],
            pooled=inside["y_embedder.mlp.0.weight"][1],
            table=table,
            dual=tuple(n for n in sorted(numbers) if f"joint_blocks.{n}.x_block.attn2.qkv.weight" in inside),
            qk_norm="joint_blocks.0.x_block.attn.ln_k.weight" in inside,
        )
    except KeyError as error:
        raise UserError(f"the model lacks the tensor {prefix}{error.args[0]}") from None


def model_facts(variant: str) -> dict[str, Any]:
    """`Writer.metadata` of a model, without the options of a training."""
    return {
        "ss_v2": False,
        "ss_base_model_version": variant,
        "modelspec.architecture": f"stable-diffusion-3-{variant}",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "flow",
        "modelspec.resolution": "1024x1024",
    }


def variant(*, dual: bool, qk_norm: bool) -> str:
    """`medium`, `5-medium` or `5-large`, the words of published metadata."""
    return "5-medium" if dual else "5-large" if qk_norm else "medium"
