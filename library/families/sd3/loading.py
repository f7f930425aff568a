"""Reads Stable Diffusion 3/3.5 models: single files with or without text encoders, Diffusers folders and hub ids."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.families.sd3.keymap import ENCODERS, MMDIT, mmdit_map
from library.families.sd3.spec import SD3
from library.families.sd3.variants import (
    FLAGS,
    FOLDERS,
    TITLES,
    TOKENIZERS,
    MmditShape,
    encoder_prefix,
    encoder_problem,
    folder_problem,
    mismatch,
    mmdit_prefix,
    mmdit_shape,
    variant,
)
from library.families.shared.building import build, meta_model
from library.families.shared.clip import build_clip, clip_config
from library.families.shared.hub import hub_folder
from library.families.shared.reading import (
    Reader,
    counters,
    error_prefix,
    file_kind,
    folder_dtypes,
    from_pretrained,
    load_vae,
    meta_model_of_folder,
    open_model,
    require_model_name,
    vae_from_file,
    vae_origin,
)
from library.families.shared.recognition import recognise
from library.families.shared.t5 import build_t5, t5_from_folder, t5_keys
from library.families.shared.vae import VAE

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.families.sd3.options import Sd3Options
    from library.families.shared.reading import TensorSpec
    from library.options.base import Options

SCALING_FACTOR, SHIFT_FACTOR = 1.5305, 0.0609
CHANNELS = 16
PROJECTION = "text_projection.weight"
HUB_PARTS = ("transformer", "vae", "scheduler", *FOLDERS.values(), *TOKENIZERS.values())


@dataclass(frozen=True)
class Source:
    """The origin of a model, with what is needed to save it in the same form."""

    name: str  # path or hub id
    vae_name: str  # where the VAE came from
    variant: str  # "medium", "5-medium" or "5-large"
    folder: str | None = None  # of a model that is no single file: where it lies on this machine
    prefix: str = MMDIT  # before the denoiser's names in the file
    encoder_names: dict[str, str] = field(default_factory=dict)  # where each text encoder came from: file or folder
    clip_l: tuple[int, int] | None = None  # widths of CLIP-L's states and pooled vector, where it was loaded
    parts: frozenset[str] = frozenset()  # what else the file held: "vae", and names of text encoders
    tensor_specs: dict[str, TensorSpec] = field(
        default_factory=dict
    )  # dtype and shape that each used key of the file had
    preserved: tuple[str, ...] = ()  # keys of the file that the model does not use
    part_dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of a folder, by subfolder
    counters: dict[str, int] = field(default_factory=dict)  # epoch and global_step of a .ckpt
    file_kind: str = "safetensors"  # of a file, "safetensors" or "ckpt"

    @property
    def is_file(self) -> bool:
        return self.folder is None

    @property
    def save_as(self) -> str:
        """The output format that is the same kind as the source."""
        if not self.is_file:
            return "diffusers_safetensors" if "transformer" in self.part_dtypes else "diffusers"
        return self.file_kind


@dataclass
class Parts:
    denoiser: nn.Module | None
    text_encoders: dict[str, nn.Module]
    vae: nn.Module | None
    source: Source | None


def load_model(
    name: str, encoder_files: Mapping[str, str], vae_name: str | None = None, *, mapped: bool = True
) -> Parts:
    """Loads a model on the CPU, frozen: the VAE in float32, the rest in the formats of its files (not 8 bit ones).

    Args:
        name: a single file, a Diffusers folder or a hub id.
        encoder_files: by names of text encoders, files to take them from instead.
        vae_name: where to take the VAE from instead; see `load_vae`. Without it, a model may have no VAE.
        mapped: False reads .safetensors files from beginning to end instead of mapping them.
    Raises: UserError: missing, unreadable, incomplete, of another family, or parts that do not fit together.
    """
    parts = _load(name, encoder_files, {"vae"} if vae_name else set(), mapped)
    if vae_name:
        parts.vae, tensor_specs = load_vae(vae_name, **VAE_FACTS)
        parts.source = replace(_with_specs(parts.source, VAE, tensor_specs, "vae"), vae_name=vae_name)
    return parts


def load_text_encoders(name: str | None, encoder_files: Mapping[str, str], *, mapped: bool = True) -> Parts:
    """The text encoders of `load_model` by themselves. The denoiser is a `meta_model`, and there is no VAE.

    Without `name`, `encoder_files` has all of them, and there is neither denoiser nor source.

    Raises: UserError: as `load_model`.
    """
    if name:
        return _load(name, encoder_files, {"vae", "denoiser"}, mapped)
    encoders = {part: load_encoder(encoder_files[part], part, mapped=mapped)[0] for part in TITLES}
    return Parts(None, encoders, None, None)


def _load(name: str, encoder_files: Mapping[str, str], skip: Collection[str], mapped: bool) -> Parts:
    """`skip`: parts that are not read, of "denoiser", which is a meta model then, and "vae".

    Raises: UserError: as `load_model`; encoders of other widths than the denoiser asks for.
    """
    skip = frozenset(encoder_files) | frozenset(skip)
    parts = _load_file(name, skip, mapped=mapped) if Path(name).is_file() else _load_folder(name, skip)
    for part, file in encoder_files.items():
        parts.text_encoders[part], tensor_specs = load_encoder(file, part, mapped=mapped)
        source = _with_specs(parts.source, ENCODERS[part], tensor_specs, FOLDERS[part])
        parts.source = replace(source, encoder_names=source.encoder_names | {part: file})
    encoders = parts.text_encoders = {part: parts.text_encoders[part] for part in TITLES if part in parts.text_encoders}
    wanted = parts.denoiser.config
    if "te1" in encoders and "te2" in encoders:
        pooled = encoders["te1"].config.projection_dim + encoders["te2"].config.projection_dim
        if pooled != wanted.pooled_projection_dim:
            raise UserError(
                f"CLIP-L and CLIP-G give pooled vectors of width {pooled} together, the model needs "
                f"{wanted.pooled_projection_dim}; give the text encoders that belong to it"
            )
    if "te3" in encoders and encoders["te3"].config.d_model != wanted.joint_attention_dim:
        raise UserError(
            f"T5 gives states of width {encoders['te3'].config.d_model}, the model needs "
            f"{wanted.joint_attention_dim}; give the T5 that belongs to it"
        )
    if "te1" in encoders:
        config = encoders["te1"].config
        parts.source = replace(parts.source, clip_l=(config.hidden_size, config.projection_dim))
    return parts


VAE_FACTS: dict[str, Any] = {
    "kinds": (SD3,),
    "channels": CHANNELS,
    "scaling_factor": SCALING_FACTOR,
    "shift_factor": SHIFT_FACTOR,
}


def load_vae_alone(opts: Options) -> nn.Module:
    """The VAE that the options name, without its model, as `load_model` would return it.

    Raises: UserError: missing, unreadable, or without such a VAE.
    """
    return load_vae(vae_origin(opts.model.vae, opts.model.pretrained_model_name_or_path), **VAE_FACTS)[0]


def load_encoder(name: str, part: str, *, mapped: bool = True) -> tuple[nn.Module, dict[str, TensorSpec]]:
    """Loads a text encoder, and the dtypes and shapes of its tensors by a whole model's file names (none for folders).

    Args:
        name: the encoder's own file, a whole model's, or a Diffusers folder.
        mapped: see `load_model`.
    Raises: UserError: missing, unreadable, or not this encoder.
    """
    if Path(name).is_dir():
        return _encoder_from_folder(Path(name), part, folder_dtypes(Path(name), [FOLDERS[part]])), {}
    with error_prefix(name):
        weights = open_model(Path(name), mapped=mapped)
        problem = encoder_problem(weights.shapes, part)
        if problem:
            raise UserError(problem)
        prefix = encoder_prefix(weights, part) or ""
        reader = Reader(weights, None)
        encoder = encoder_of_file(reader, part, prefix)
    return encoder, {ENCODERS[part] + key.removeprefix(prefix): form for key, form in reader.tensor_specs.items()}


def _with_specs(source: Source, prefix: str, tensor_specs: Mapping[str, TensorSpec], folder: str) -> Source:
    """The source with a part's tensor_specs replaced by those of the file that the part came from."""
    kept = {key: form for key, form in source.tensor_specs.items() if not key.startswith(prefix)}
    dtypes = {name: dtype for name, dtype in source.part_dtypes.items() if name != folder}
    return replace(source, tensor_specs=kept | dict(tensor_specs), part_dtypes=dtypes)


# --- single files -----------------------------------------------------------------------------------------------------


def _load_file(name: str, skip: frozenset[str], *, mapped: bool) -> Parts:
    vae, vae_specs = None, {}
    with error_prefix(name):
        weights = open_model(Path(name), mapped=mapped)
        reader = Reader(weights, None)
        denoiser, shape = denoiser_of_file(reader, with_weights="denoiser" not in skip)
        inside = {part for part in ENCODERS if encoder_prefix(weights, part, inside=True) is not None}
        encoders = {part: encoder_of_file(reader, part, ENCODERS[part]) for part in ENCODERS if part in inside - skip}
        if any(key.startswith(VAE) for key in weights):
            inside.add("vae")
            if "vae" not in skip:
                vae, vae_specs = vae_from_file(weights, SCALING_FACTOR, SHIFT_FACTOR)
    tensor_specs = reader.tensor_specs | vae_specs
    source = Source(
        name=name,
        vae_name=name,
        variant=variant(dual=bool(shape.dual), qk_norm=shape.qk_norm),
        prefix=mmdit_prefix(weights),
        encoder_names=dict.fromkeys(encoders, name),
        parts=frozenset(inside),
        tensor_specs=tensor_specs,
        preserved=tuple(key for key in weights if key not in tensor_specs),
        counters=counters(weights),
        file_kind=file_kind(weights),
    )
    return Parts(denoiser, encoders, vae, source)


def denoiser_of_file(reader: Reader, *, with_weights: bool = True) -> tuple[nn.Module, MmditShape]:
    """The denoiser, or its `meta_model`. Raises: UserError: another kind of model, or an incomplete one."""
    from diffusers import SD3Transformer2DModel

    weights = reader.weights
    problem = mismatch(recognise(weights))
    if problem:
        raise UserError(problem)
    prefix = mmdit_prefix(weights)
    shape = mmdit_shape(weights.shapes, prefix)
    make = partial(SD3Transformer2DModel, **shape.diffusers_config())
    if not with_weights:
        return meta_model(make), shape
    others = () if prefix else (VAE, *ENCODERS.values())
    keys = [key for key in weights if key.startswith(prefix) and not key.startswith(others)]
    tensors = mmdit_map(shape.depth, prefix).to_model(reader.take(keys))
    return build(make, tensors, "the denoiser"), shape


def encoder_of_file(reader: Reader, part: str, prefix: str) -> nn.Module:
    """A text encoder whose names in a file begin with `prefix`. Raises: UserError: it is incomplete."""
    import torch

    names = [key.removeprefix(prefix) for key in reader.weights if key.startswith(prefix)]
    if part == "te3":
        return build_t5(_taken(reader, prefix, t5_keys(names)), "T5")
    used = [name for name in names if name.startswith("text_model.") and not name.endswith("position_ids")]
    tensors = _taken(reader, prefix, [*used, PROJECTION] if PROJECTION in names else used)
    is_l = part == "te1"
    if PROJECTION not in tensors:  # files of CLIP-L often lack it: what is pooled is then taken as it is
        if not is_l:
            raise UserError(f"{TITLES[part]} lacks the tensor {PROJECTION}")
        like = tensors["text_model.final_layer_norm.weight"]
        tensors[PROJECTION] = torch.eye(len(like), dtype=like.dtype, device=like.device)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = clip_config(shapes, hidden_act="quick_gelu" if is_l else "gelu", pad_id=49407 if is_l else 0)
    return build_clip(tensors, config, TITLES[part])


def _taken(reader: Reader, prefix: str, names: list[str]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in reader.take(prefix + name for name in names).items()}


# --- Diffusers folders and the hub ------------------------------------------------------------------------------------


def _load_folder(name: str, skip: frozenset[str]) -> Parts:
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    require_model_name(name)
    without_weights = {"denoiser": "transformer", "vae": "vae"}
    unread = [folder for part, folder in without_weights.items() if part in skip]
    folder = Path(name) if Path(name).is_dir() else hub_folder(name, HUB_PARTS, folder_problem, unread)
    with error_prefix(name):
        problem = folder_problem(folder)
        if problem:
            raise UserError(problem)
    there = [part for part, place in FOLDERS.items() if (folder / place / "config.json").is_file()]
    dtypes = folder_dtypes(folder, ("transformer", "vae", *FOLDERS.values()))
    with error_prefix(name):
        if "denoiser" in skip:
            denoiser = meta_model_of_folder(SD3Transformer2DModel, str(folder), "transformer")
        else:
            denoiser = from_pretrained(SD3Transformer2DModel, str(folder), "transformer", dtypes.get("transformer"))
        encoders = {part: _encoder_from_folder(folder, part, dtypes) for part in there if part not in skip}
        vae = None
        if "vae" not in skip and (folder / "vae").is_dir():
            vae = from_pretrained(AutoencoderKL, str(folder), "vae")
    config = denoiser.config
    source = Source(
        name=name,
        vae_name=str(folder),
        variant=variant(dual=bool(config.dual_attention_layers), qk_norm=config.qk_norm is not None),
        folder=str(folder),
        encoder_names=dict.fromkeys(encoders, str(folder)),
        parts=frozenset({"vae"}),
        part_dtypes=dtypes,
    )
    return Parts(denoiser, encoders, vae, source)


def _encoder_from_folder(folder: Path, part: str, dtypes: Mapping[str, torch.dtype]) -> nn.Module:
    from transformers import CLIPTextModelWithProjection

    dtype = dtypes.get(FOLDERS[part])
    if part == "te3":
        return t5_from_folder(folder, FOLDERS[part], dtype)
    return from_pretrained(CLIPTextModelWithProjection, str(folder), FOLDERS[part], dtype)


def encoder_file_options(family: Sd3Options) -> dict[str, str]:
    """The files of text encoders that the options give, by part."""
    return {part: file for part, option in FLAGS.items() if (file := getattr(family, option))}
