"""Reads SDXL models: single files, Diffusers folders and hub ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.keymap import KeyMap
from library.errors import UserError
from library.families.sdxl.keymap import PROJECTION, TE1, TE2, text1_map, text2_map
from library.families.sdxl.options import TRAITS
from library.families.sdxl.variants import VAE_SOURCES, file_problem, folder_problem, projection_name, text_keys
from library.families.shared import reading
from library.families.shared.building import build
from library.families.shared.clip import build_clip, clip_config
from library.families.shared.reading import Reader, error_prefix, from_pretrained, open_model
from library.families.shared.unet import UNET, channels_problem, unet_map, unet_shape
from library.families.shared.vae import VAE

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.families.shared.reading import TensorSpec, Weights
    from library.options.base import Options

SCALING_FACTOR = 0.13025
SAMPLE_SIZE = 128  # side of the latents that pipelines make by default
PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")  # of a Diffusers folder


@dataclass(frozen=True)
class Source(reading.Source):
    """The origin of a model, with what is needed to save it in the same form."""

    projection: str = PROJECTION  # the file's name of the second text encoder's projection


@dataclass
class Parts:
    denoiser: nn.Module | None
    text_encoders: dict[str, nn.Module]
    vae: nn.Module | None
    source: Source | None


def load_model(name: str, vae_name: str | None = None, *, mapped: bool = True, inpainting: bool = False) -> Parts:
    """Loads a whole model on the CPU, frozen, in the formats that it is stored in; the VAE in float32.

    Args:
        name: a single file, a Diffusers folder or a hub id.
        vae_name: where to take the VAE from instead; see `load_vae`.
        mapped: False reads a .safetensors file from its beginning to its end instead of mapping it.
        inpainting: whether models for inpainting will do.
    Raises: UserError: missing, unreadable, incomplete or of another family.
    """
    if Path(name).is_file():
        parts = _load_file(name, mapped=mapped, with_vae=not vae_name, inpainting=inpainting)
    else:
        parts = _load_folder(name, with_vae=not vae_name, inpainting=inpainting)
    if vae_name:
        parts.vae, tensor_specs = load_vae(vae_name)
        parts.source = parts.source.with_vae(vae_name, tensor_specs)
    return parts


def load_text_encoders(name: str, *, mapped: bool = True) -> Parts:
    """The text encoders of `load_model` by themselves, and nothing else. Raises: UserError: as `load_model`."""
    if not Path(name).is_file():
        reading.require_model_name(name)
    with error_prefix(name):
        if Path(name).is_file():
            encoders = text_encoders_of_file(Reader(_open_file(Path(name), mapped), None))
        else:
            encoders = _text_encoders_of_folder(name, _folder_dtypes(name))
    return Parts(None, encoders, None, None)


def load_vae(name: str) -> tuple[nn.Module, dict[str, TensorSpec]]:
    """The VAE of a file, folder or hub id, see `shared.reading.load_vae`."""
    return reading.load_vae(name, kinds=VAE_SOURCES, channels=TRAITS.latent_channels, scaling_factor=SCALING_FACTOR)


def load_vae_alone(opts: Options) -> nn.Module:
    """The VAE that the options name, as a whole model would have it. Raises: UserError: as `load_vae`."""
    return load_vae(reading.vae_origin(opts.model.vae, opts.model.pretrained_model_name_or_path))[0]


# --- single files -----------------------------------------------------------------------------------------------------


def _load_file(name: str, *, mapped: bool, with_vae: bool, inpainting: bool) -> Parts:
    """`with_vae`: False leaves the file's VAE unread, whatever it is."""
    vae, vae_specs = None, {}
    with error_prefix(name):
        weights = _open_file(Path(name), mapped)
        reader = Reader(weights, None)
        denoiser, text_encoders = unet_of_file(reader, inpainting=inpainting), text_encoders_of_file(reader)
        if with_vae:
            vae, vae_specs = reading.vae_of_model_file(weights, SCALING_FACTOR)
    tensor_specs = reader.tensor_specs | vae_specs
    source = Source(
        name=name,
        vae_name=name,
        is_file=True,
        tensor_specs=tensor_specs,
        preserved=tuple(key for key in weights if key not in tensor_specs and (with_vae or not key.startswith(VAE))),
        counters=reading.counters(weights),
        file_kind=reading.file_kind(weights),
        projection=projection_name(weights),
    )
    return Parts(denoiser, text_encoders, vae, source)


def _open_file(path: Path, mapped: bool) -> Weights:
    weights = open_model(path, mapped=mapped)
    problem = file_problem(weights)
    if problem:
        raise UserError(problem)
    return weights


def unet_of_file(reader: Reader, *, inpainting: bool = False) -> nn.Module:
    """Raises: UserError: the U-Net is incomplete, or of another kind."""
    from diffusers import UNet2DConditionModel

    shape = unet_shape(reader.weights.shapes, inpainting=inpainting)
    if shape.added is None:
        raise UserError(f"the U-Net lacks the tensor {UNET}label_emb.0.0.weight of the size conditioning")
    keys = unet_map(shape.layers, shape.attention, added=True)
    make = partial(UNet2DConditionModel, **shape.diffusers_config(sample_size=SAMPLE_SIZE))
    unet_keys = [key for key in reader.weights if key.startswith(UNET)]
    return build(make, keys.to_model(reader.take(unet_keys)), "the U-Net")


def text_encoders_of_file(reader: Reader) -> dict[str, nn.Module]:
    """Raises: UserError: a text encoder is incomplete."""
    second = text2_map(projection_name(reader.weights))
    return {
        "te1": _text_encoder(reader, TE1, text1_map(), hidden_act="quick_gelu", pad_id=49407),
        "te2": _text_encoder(reader, TE2, second, hidden_act="gelu", pad_id=0),
    }


def _text_encoder(reader: Reader, prefix: str, keys: KeyMap, *, hidden_act: str, pad_id: int) -> nn.Module:
    tensors = keys.to_model(reader.take(text_keys(reader.weights, prefix)))
    if prefix == TE2 and "text_projection.weight" not in tensors:
        raise UserError(f"the second text encoder lacks the tensor {TE2}{PROJECTION}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    what = f"the text encoder at {prefix.rstrip('.')}"
    return build_clip(tensors, clip_config(shapes, hidden_act=hidden_act, pad_id=pad_id), what)


# --- Diffusers folders and the hub ------------------------------------------------------------------------------------


def _load_folder(name: str, *, with_vae: bool, inpainting: bool) -> Parts:
    from diffusers import UNet2DConditionModel

    reading.require_model_name(name)
    with error_prefix(name):
        dtypes = _folder_dtypes(name, inpainting=inpainting)
        text_encoders = _text_encoders_of_folder(name, dtypes)
        denoiser = from_pretrained(UNet2DConditionModel, name, "unet", dtypes.get("unet"))
        if denoiser.config.addition_embed_type != "text_time":
            raise UserError("its U-Net has no size conditioning (add_embedding), so this is no SDXL model")
        problem = channels_problem(denoiser.config.in_channels, inpainting=inpainting)
        if problem:
            raise UserError(problem)
        vae = reading.vae_of_model_folder(name) if with_vae else None
    return Parts(denoiser, text_encoders, vae, Source(name, name, is_file=False, part_dtypes=dtypes))


def _folder_dtypes(name: str, *, inpainting: bool = False) -> dict[str, torch.dtype]:
    """The dtype of each part of a folder; none of a hub model. Raises: UserError: a folder of another family."""
    problem = folder_problem(Path(name), inpainting=inpainting) if Path(name).is_dir() else None
    if problem:
        raise UserError(problem)
    return reading.folder_dtypes(Path(name), PARTS)


def _text_encoders_of_folder(name: str, dtypes: Mapping[str, torch.dtype]) -> dict[str, nn.Module]:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    # First what a model of another family lacks, so that little of one is fetched.
    second = from_pretrained(CLIPTextModelWithProjection, name, "text_encoder_2", dtypes.get("text_encoder_2"))
    return {"te1": from_pretrained(CLIPTextModel, name, "text_encoder", dtypes.get("text_encoder")), "te2": second}
