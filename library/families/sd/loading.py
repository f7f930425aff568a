"""Reads Stable Diffusion 1.x/2.x models: single files, Diffusers folders and hub ids."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.reading import open_weights
from library.errors import UserError
from library.families.sd.keymap import text_map
from library.families.sd.options import TRAITS
from library.families.sd.spec import SD1, SD2
from library.families.sd.variants import (
    SD1_HEADS,
    VAE_SOURCES,
    folder_problem,
    has_text_model_level,
    mismatch,
    text_keys,
)
from library.families.shared import reading
from library.families.shared.building import build
from library.families.shared.clip import build_clip, clip_config
from library.families.shared.reading import Reader, error_prefix, from_pretrained
from library.families.shared.recognition import recognise
from library.families.shared.unet import UNET, channels_problem, unet_map, unet_shape
from library.families.shared.vae import VAE

if TYPE_CHECKING:
    from torch import nn

    from library.families.shared.reading import TensorSpec
    from library.options.base import Options

SCALING_FACTOR = 0.18215


@dataclass(frozen=True)
class Source(reading.Source):
    """The origin of a model, with what is needed to save it in the same form."""

    v2: bool = False
    text_model_level: bool = True  # of an SD 1.x file's names


@dataclass
class Parts:
    denoiser: nn.Module
    text_encoder: nn.Module
    vae: nn.Module | None
    source: Source


def load_model(
    name: str, v2: bool, vae_name: str | None = None, *, variant: str | None = None, inpainting: bool = False
) -> Parts:
    """Loads a whole model on the CPU, in float32, frozen.

    Args:
        name: a single file, a Diffusers folder or a hub id.
        v2: whether it must be a 2.x model (else it must be 1.x).
        vae_name: where to take the VAE from instead; see `load_vae`.
        variant: of a Diffusers model's weights, see `from_pretrained`.
        inpainting: whether models for inpainting will do.
    Raises: UserError: missing, unreadable, incomplete or of another family.
    """
    if Path(name).is_file():
        parts = _load_file(name, v2, with_vae=not vae_name, inpainting=inpainting)
    else:
        parts = _load_folder(name, v2, variant, with_vae=not vae_name, inpainting=inpainting)
    if vae_name:
        parts.vae, tensor_specs = load_vae(vae_name)
        parts.source = parts.source.with_vae(vae_name, tensor_specs)
    return parts


def load_vae(name: str) -> tuple[nn.Module, dict[str, TensorSpec]]:
    """The VAE of a file, folder or hub id, see `shared.reading.load_vae`."""
    return reading.load_vae(name, kinds=VAE_SOURCES, channels=TRAITS.latent_channels, scaling_factor=SCALING_FACTOR)


def load_vae_alone(opts: Options) -> nn.Module:
    """The VAE that the options name, as a whole model would have it. Raises: UserError: as `load_vae`."""
    return load_vae(reading.vae_origin(opts.model.vae, opts.model.pretrained_model_name_or_path))[0]


# --- single files -----------------------------------------------------------------------------------------------------


def _load_file(name: str, v2: bool, *, with_vae: bool, inpainting: bool) -> Parts:
    """`with_vae`: False leaves the file's VAE unread, whatever it is."""
    import torch

    vae, vae_specs = None, {}
    path = Path(name)
    with error_prefix(path):
        weights = open_weights(path)
        problem = mismatch(recognise(weights), v2)
        if problem:
            raise UserError(problem)
        reader = Reader(weights, torch.float32)
        level = v2 or has_text_model_level(weights)
        denoiser = unet_of_file(reader, v2, inpainting=inpainting)
        text_encoder = text_encoder_of_file(reader, v2, level)
        if with_vae:
            vae, vae_specs = reading.vae_of_model_file(weights, SCALING_FACTOR)
    tensor_specs = reader.tensor_specs | vae_specs
    source = Source(
        name=name,
        vae_name=name,
        v2=v2,
        is_file=True,
        text_model_level=level,
        tensor_specs=tensor_specs,
        preserved=tuple(key for key in weights if key not in tensor_specs and (with_vae or not key.startswith(VAE))),
        counters=reading.counters(weights),
        file_kind=reading.file_kind(weights),
    )
    return Parts(denoiser, text_encoder, vae, source)


def unet_of_file(reader: Reader, v2: bool, *, inpainting: bool = False) -> nn.Module:
    """Raises: UserError: the U-Net is incomplete, or of another kind."""
    from diffusers import UNet2DConditionModel

    shape = unet_shape(reader.weights.shapes, inpainting=inpainting)
    keys = unet_map(shape.layers, shape.attention)
    make = partial(UNet2DConditionModel, **shape.diffusers_config(heads=None if v2 else SD1_HEADS))
    unet_keys = [key for key in reader.weights if key.startswith(UNET)]
    return build(make, keys.to_model(reader.take(unet_keys)), "the U-Net")


def text_encoder_of_file(reader: Reader, v2: bool, level: bool) -> nn.Module:
    """`level`: as `text_map` takes it. Raises: UserError: the text encoder is incomplete."""
    tensors = text_map(v2, level).to_model(reader.take(text_keys(reader.weights, v2)))
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    config = clip_config(shapes, hidden_act="gelu" if v2 else "quick_gelu", pad_id=0 if v2 else 49407)
    return build_clip(tensors, config, "the text encoder")


# --- Diffusers folders and the hub ------------------------------------------------------------------------------------


def _load_folder(name: str, v2: bool, variant: str | None, *, with_vae: bool, inpainting: bool) -> Parts:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    reading.require_model_name(name)
    with error_prefix(name):
        if Path(name).is_dir():
            problem = folder_problem(Path(name), v2, inpainting=inpainting)
            if problem:
                raise UserError(problem)
        text_encoder = from_pretrained(CLIPTextModel, name, "text_encoder", variant=variant)
        problem = mismatch(SD2 if text_encoder.config.hidden_act == "gelu" else SD1, v2)
        if problem:
            raise UserError(problem)
        denoiser = from_pretrained(UNet2DConditionModel, name, "unet", variant=variant)
        problem = channels_problem(denoiser.config.in_channels, inpainting=inpainting)
        if problem:
            raise UserError(problem)
        vae = reading.vae_of_model_folder(name, variant) if with_vae else None
    dtypes = reading.folder_dtypes(Path(name), ("unet", "text_encoder", "vae"), variant)
    return Parts(denoiser, text_encoder, vae, Source(name, name, is_file=False, part_dtypes=dtypes, v2=v2))
