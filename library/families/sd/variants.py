"""Which Stable Diffusion a file is, by names and shapes alone: no torch, so that mistakes are found at once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.families.sd.keymap import CLIP, OPEN_CLIP
from library.families.sd.spec import SD1, SD2
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
SD1_HEADS = 8  # not visible in shapes; the real models' rule. 2.x has heads of 64
VAE_SOURCES = (SD1, SD2)  # files that a VAE may be taken from


def mismatch(kind: ModelKind, v2: bool) -> str | None:
    """Why a file of this kind is not the model that is asked for; None when it is."""
    if kind == (SD2 if v2 else SD1):
        return None
    if kind == SD2:
        return f"this is {SD2}; add --v2"
    if kind == SD1:
        return f"this is {SD1}; remove --v2"
    return f"this is {kind}; a whole Stable Diffusion 1.x or 2.x model is needed here"


def model_facts(v2: bool, v_prediction: bool, *, inpaints: bool = False) -> dict[str, Any]:
    """`Writer.metadata` of a model. Args: inpaints: whether it is one for inpainting."""
    architecture = "stable-diffusion-v1"
    if v2:
        architecture = "stable-diffusion-v2-768-v" if v_prediction else "stable-diffusion-v2-512"
    return {
        "ss_v2": v2,
        "ss_base_model_version": f"sd_v{2 if v2 else 1}{'_v' if v_prediction else ''}",
        "modelspec.architecture": architecture,
        **inpainting_facts(f"stable-diffusion-v{2 if v2 else 1}-inpainting", inpaints),
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
        "modelspec.resolution": "768x768" if v2 and v_prediction else "512x512",
    }


def check_paths(opts: Options) -> list[str]:
    """Every problem with the paths of model, VAE and ControlNet that can be seen without loading anything.

    Reads only the names in files and the small JSON files of Diffusers folders.
    """
    flag, model, vae = "--pretrained_model_name_or_path", opts.model.pretrained_model_name_or_path, opts.model.vae
    if not model:
        return [f"{flag}: name a model: a file, a Diffusers folder or a hub id"]

    inpainting = takes_inpainting(opts)

    def of_model(path: Path) -> str | None:
        if path.is_dir():
            problem = folder_problem(path, opts.family.v2, inpainting=inpainting)
            return problem or (None if vae else missing_vae_folder(path))
        shapes = file_shapes(path)
        if shapes is None:
            return None
        lacking = None if vae else missing_vae(shapes)
        problem = mismatch(recognise(shapes), opts.family.v2) or input_problem(shapes, inpainting=inpainting)
        return problem or lacking

    problems = [path_problem(flag, model, of_model)]
    if vae:
        problems.append(path_problem("--vae", vae, lambda path: vae_problem(path, VAE_SOURCES)))
    problems.append(controlnet_problem(opts, "ControlNetModel"))
    return [problem for problem in problems if problem]


def folder_problem(path: Path, v2: bool, *, inpainting: bool = False) -> str | None:
    """Why a Diffusers folder is not the model that is asked for; None when it is.

    Args: inpainting: whether models for inpainting will do.
    """
    if not (path / "unet" / "config.json").is_file():
        kind = pipeline_kind(path)
        return f"this is {kind}" if kind else "not a Diffusers model folder: unet/config.json is missing"
    kind = pipeline_kind(path) or folder_kind(path)
    channels = read_json(path / "unet" / "config.json").get("in_channels", CHANNELS)
    return mismatch(kind, v2) or channels_problem(channels, inpainting=inpainting)


def folder_kind(path: Path) -> ModelKind:
    """SD1 or SD2, by the activation function of the folder's text encoder."""
    if (path / "text_encoder_2").is_dir():
        return SDXL
    return SD2 if read_json(path / "text_encoder" / "config.json").get("hidden_act") == "gelu" else SD1


def has_text_model_level(keys: Iterable[str]) -> bool:
    """Whether an SD 1.x file writes `text_model.` in its text encoder's names; some leave it out."""
    return any(key.startswith(f"{CLIP}text_model.") for key in keys)


def text_keys(keys: Iterable[str], v2: bool) -> list[str]:
    """The text encoder's keys that are used.

    SD 2.x files hold one layer more than is run (the penultimate one is the output), a projection and a scale; both
    layouts may hold position numbers.
    """
    prefix = OPEN_CLIP if v2 else CLIP
    inside = [key for key in keys if key.startswith(prefix) and not key.endswith("position_ids")]
    if not v2:
        return inside
    layer = re.compile(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
    numbers = {key: int(match[1]) for key in inside if (match := layer.match(key))}
    last = max(numbers.values(), default=0)
    outside = {prefix + name for name in ("text_projection", "text_projection.weight", "logit_scale", "attn_mask")}
    return [key for key in inside if key not in outside and numbers.get(key, -1) != last]
