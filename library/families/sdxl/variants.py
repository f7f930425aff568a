"""Whether a file or folder is SDXL, by names alone: no torch, so that mistakes are found at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.families.sdxl.keymap import PROJECTION, PROJECTION_LAYER, TE1, TE2
from library.families.sdxl.lllite_file import PREFIX, sizes_of
from library.families.sdxl.spec import SDXL
from library.families.shared.recognition import (
    controlnet_problem,
    file_shapes,
    missing_vae_folder,
    path_problem,
    pipeline_kind,
    read_json,
    recognise,
    vae_problem,
)
from library.families.shared.unet import CHANNELS, channels_problem, inpainting_facts, input_problem, takes_inpainting
from library.families.shared.vae import missing_vae

if TYPE_CHECKING:
    from library.families.spec import ModelKind
    from library.options.base import Options

ORIGINAL_CODE = "https://github.com/Stability-AI/generative-models"
VAE_SOURCES = (SDXL,)  # files that a VAE may be taken from
UNUSED_TEXT = ("logit_scale", "attn_mask", "position_ids")  # ends of names below the text encoders


def model_facts(v_prediction: bool, *, inpaints: bool = False) -> dict[str, Any]:
    """`Writer.metadata` of a model. Args: inpaints: whether it is one for inpainting."""
    return {
        "ss_v2": False,
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        **inpainting_facts("stable-diffusion-xl-v1-inpainting", inpaints),
        "modelspec.implementation": ORIGINAL_CODE,
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
        "modelspec.resolution": "1024x1024",
    }


def check_paths(opts: Options) -> list[str]:
    """Every problem with the paths of model, VAE and ControlNet that can be seen without loading anything.

    Reads only the names in files and the small JSON files of Diffusers folders.
    """
    vae = opts.model.vae
    problems = _model_problems(opts, needs_vae=not vae)
    if vae:
        problems.append(path_problem("--vae", vae, lambda path: vae_problem(path, VAE_SOURCES)))
    problems.append(controlnet_problem(opts, "ControlNetModel"))
    lllite = opts.method.lllite_weights
    if lllite:
        problems.append(path_problem("--network_weights", lllite, lambda path: _lllite_problem(path, opts)))
    return [problem for problem in problems if problem]


def _lllite_problem(path: Path, opts: Options) -> str | None:
    """What is wrong with the file of a ControlNet-LLLite; options may not say other widths than it has."""
    shapes = file_shapes(path)
    if shapes is None:
        return None
    if not any(key.startswith(PREFIX) for key in shapes):
        return f"this is {recognise(shapes)}; a ControlNet-LLLite is needed here"
    sizes = sizes_of(shapes).values()
    for option, found in (
        ("cond_emb_dim", {size.embedding for size in sizes}),
        ("network_dim", {size.inner for size in sizes}),
    ):
        asked = getattr(opts.method, option)
        if asked and found != {asked}:
            return f"its --{option} is {', '.join(map(str, sorted(found)))}, not {asked}; leave the option out"
    return None


def check_text_paths(opts: Options) -> list[str]:
    """`check_paths` for texts alone: without a VAE."""
    return [problem for problem in _model_problems(opts, needs_vae=False) if problem]


def _model_problems(opts: Options, *, needs_vae: bool) -> list[str | None]:
    flag, model = "--pretrained_model_name_or_path", opts.model.pretrained_model_name_or_path
    if not model:
        return [f"{flag}: name a model: a file, a Diffusers folder or a hub id"]

    inpainting = takes_inpainting(opts)

    def of_model(path: Path) -> str | None:
        if path.is_dir():
            problem = folder_problem(path, inpainting=inpainting)
            return problem or (missing_vae_folder(path) if needs_vae else None)
        shapes = file_shapes(path)
        if shapes is None:
            return None
        problem = file_problem(shapes) or input_problem(shapes, inpainting=inpainting)
        return problem or (missing_vae(shapes) if needs_vae else None)

    return [path_problem(flag, model, of_model)]


def file_problem(keys: Iterable[str]) -> str | None:
    """Why a file with these keys is not a whole SDXL model; None when it is."""
    keys = list(keys)
    kind = recognise(keys)
    if kind != SDXL:
        return _mismatch(kind)
    if not any(key.startswith(TE1) for key in keys):
        return "this is an SDXL model with one text encoder (the refiner?); the base model, which has two, is needed"
    return None


def folder_problem(path: Path, *, inpainting: bool = False) -> str | None:
    """Why a Diffusers folder is not the model that is asked for; None when it is.

    Args: inpainting: whether models for inpainting will do.
    """
    kind = pipeline_kind(path)
    if not (path / "unet" / "config.json").is_file():
        return _mismatch(kind) if kind else "not a Diffusers model folder: unet/config.json is missing"
    if kind not in (None, SDXL):
        return _mismatch(kind)
    if not (path / "text_encoder_2").is_dir():
        return _mismatch("a Diffusers model with one text encoder")
    if not (path / "text_encoder").is_dir():
        return "this is an SDXL model with one text encoder (the refiner?); the base model, which has two, is needed"
    channels = read_json(path / "unet" / "config.json").get("in_channels", CHANNELS)
    return channels_problem(channels, inpainting=inpainting)


def _mismatch(kind: ModelKind | str) -> str:
    return f"this is {kind}; a whole SDXL model is needed here"


def text_keys(keys: Iterable[str], prefix: str) -> list[str]:
    """The keys of the text encoder below `prefix` that its model has a place for."""
    return [key for key in keys if key.startswith(prefix) and not key.endswith(UNUSED_TEXT)]


def projection_name(keys: Iterable[str]) -> str:
    """The name of the second text encoder's projection in a file."""
    return PROJECTION_LAYER if TE2 + PROJECTION_LAYER in keys else PROJECTION
