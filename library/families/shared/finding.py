"""Which family a model is of, where no option says it. Only names are read: no torch, but for pickles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.families.sd.options import TRAITS
from library.families.sd.spec import SD1
from library.families.sd.variants import folder_kind
from library.families.sdxl.spec import SDXL
from library.families.shared import hub
from library.families.shared.reading import error_prefix
from library.families.shared.recognition import (
    FAMILY_OF,
    UNKNOWN,
    VAE_ONLY,
    file_shapes,
    is_hub_id,
    pipeline_kind,
    pipeline_named,
    read_json,
    recognise,
    recognise_file,
)

if TYPE_CHECKING:
    from library.families.spec import ModelKind

_INDEX = "model_index.json"
# Pipelines of the first models have no word of their own in their names.
_FIRST, _FIRST_DENOISER = "StableDiffusion", "UNet2DConditionModel"


def kind_of(name: str, option: str = "--family") -> ModelKind:
    """The kind of a file, folder or hub id; UNKNOWN where its names fit nothing. `option`: as for `family_of`.

    Raises: UserError: it is not there, or broken; or the hub would have to be asked and does not answer.
    """
    path = Path(name)
    if os.path.isfile(name):
        with error_prefix(path):
            kind = recognise_file(path)
            if kind is None:
                from library.checkpoints.reading import open_weights

                kind = recognise(open_weights(path))
            return kind
    if os.path.isdir(name):
        kind = pipeline_kind(path)
        if kind is not None:
            return kind
        if (path / "unet" / "config.json").is_file():
            if (path / "text_encoder" / "config.json").is_file():
                return folder_kind(path)
            return SDXL if (path / "text_encoder_2").is_dir() else SD1
        config = path / "config.json"
        is_vae = config.is_file() and read_json(config).get("_class_name") == "AutoencoderKL"
        return VAE_ONLY if is_vae else UNKNOWN
    if not is_hub_id(name):
        raise UserError(f"{name}: no such file or folder (and not a hub id of the form owner/model)")
    return _kind_of_hub_model(name, option)


def family_of(name: str, option: str = "--family") -> str:
    """The family of a model's file, folder or hub id, by its name in `library.families`.

    A VAE by itself whose latents have 4 channels is one of Stable Diffusion 1.x and 2.x, as other trainers take it.

    Args: option: what the script takes to be given the family.
    Raises: UserError: it is not there, or could be of several families, as a VAE with 16 channels is.
    """
    kind = kind_of(name, option)
    if kind in FAMILY_OF:
        return FAMILY_OF[kind]
    if kind == UNKNOWN and not os.path.exists(name):
        raise UserError(f"{name}: the hub does not say what kind of model this is; set {option}")
    if kind == VAE_ONLY:
        if os.path.isdir(name):
            channels = read_json(Path(name, "config.json")).get("latent_channels", TRAITS.latent_channels)
        else:
            shapes = file_shapes(Path(name)) or {}
            shape = next((shape for key, shape in shapes.items() if key.endswith("decoder.conv_in.weight")), ())
            channels = shape[1] if len(shape) > 1 else None
        if channels == TRAITS.latent_channels:
            return FAMILY_OF[SD1]  # what a VAE by itself has always meant
        raise UserError(f"{name}: this is {kind}, which may belong to several families; choose one with {option}")
    raise UserError(f"{name}: this is {kind}; give a whole model, or a VAE together with {option}")


def family_of_pipeline(pipeline: Any) -> str:
    """The family of a pipeline of diffusers, by its class. Raises: UserError: none that is known here."""
    name = type(pipeline).__name__
    kind = pipeline_named(name)
    if kind is None and name.startswith(_FIRST) and type(getattr(pipeline, "unet", None)).__name__ == _FIRST_DENOISER:
        kind = SD1
    if kind is None:
        raise UserError(f"{name}: pipelines of this class are not known here")
    return FAMILY_OF[kind]


def _kind_of_hub_model(name: str, option: str) -> ModelKind:
    """The kind of a hub model, from its index alone. A model without one, such as a VAE alone, stays unknown."""
    from huggingface_hub import hf_hub_download

    for local in (True, False):
        why = None if local else hub.no_answer(name)
        if why:
            raise UserError(f"{name}: the hub could not be asked for the kind of model ({why}); set {option}")
        try:
            index = Path(hf_hub_download(name, _INDEX, local_files_only=local))
        except Exception:  # whatever the hub's client and the network may raise; loading the model reports it
            continue
        is_first = str(read_json(index).get("_class_name")) == "StableDiffusionPipeline"
        return pipeline_kind(index.parent) or (SD1 if is_first else UNKNOWN)
    return UNKNOWN
