"""Reads FLUX.1 models: the transformer's file with files for the other parts, bundles, Diffusers folders, hub ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.keymap import KeyMap, KeyMapError
from library.checkpoints.reading import open_weights
from library.checkpoints.scaled import is_scale
from library.errors import UserError
from library.families.flux.keymap import AE, flux_map
from library.families.flux.spec import FLUX
from library.families.flux.variants import (
    FLAGS,
    FOLDERS,
    TITLES,
    TOKENIZERS,
    FluxShape,
    channels_problem,
    encoder_prefix,
    encoder_problem,
    flux_shape,
    folder_problem,
    mismatch,
    variant,
)
from library.families.shared.building import build, meta_model
from library.families.shared.clip import build_clip, clip_config, public_name
from library.families.shared.hub import hub_folder
from library.families.shared.reading import (
    Reader,
    counters,
    error_prefix,
    file_kind,
    folder_dtype,
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

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.families.flux.options import FluxOptions
    from library.families.shared.reading import TensorSpec, Weights
    from library.options.base import Options

SCALING_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159
CHANNELS = 16


@dataclass(frozen=True)
class Source:
    """The origin of a model, with what is needed to save it in the same form."""

    name: str  # path or hub id
    variant: str  # "dev" or "schnell"
    origins: dict[str, str]  # where the other parts came from, files or folders: "te1", "te3", "vae"
    folder: str | None = None  # of a model that is no single file: where it lies on this machine
    prefix: str = ""  # before the denoiser's names in the file
    diffusers: bool = False  # whether the file has diffusers' own names
    tensor_specs: dict[str, TensorSpec] = field(
        default_factory=dict
    )  # dtype and shape that each used key of the file had
    preserved: tuple[str, ...] = ()  # keys of the file that the denoiser does not use
    part_dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of a folder, by subfolder
    counters: dict[str, int] = field(default_factory=dict)  # epoch and global_step of a .ckpt
    file_kind: str = "safetensors"  # of a file, "safetensors" or "ckpt"

    @property
    def save_as(self) -> str:
        """The output format that is the same kind as the source."""
        if self.folder is not None:
            return "diffusers_safetensors" if self.part_dtypes else "diffusers"
        return self.file_kind


@dataclass
class Parts:
    denoiser: nn.Module | None
    text_encoders: dict[str, nn.Module]
    vae: nn.Module | None
    source: Source | None


def load_model(name: str, encoder_files: Mapping[str, str], ae: str | None = None, *, mapped: bool = True) -> Parts:
    """Loads a model on the CPU, frozen: the autoencoder in float32, the rest in the formats of its files (not 8 bit).

    Args:
        name: a single file, a Diffusers folder or a hub id.
        encoder_files: by names of text encoders, files to take them from instead.
        ae: file to take the autoencoder from instead.
        mapped: False reads .safetensors files from beginning to end instead of mapping them.
    Raises: UserError: missing, unreadable, incomplete, of another family, or parts that do not fit together.
    """
    given = {**encoder_files, **({"vae": ae} if ae else {})}
    denoiser, source = _load_denoiser(name, given, mapped=mapped)
    encoders = {part: load_encoder(source, part, mapped=mapped) for part in FLAGS}
    _check_widths(denoiser, encoders)
    return Parts(denoiser, encoders, load_ae(source), source)


def load_text_encoders(name: str | None, encoder_files: Mapping[str, str], *, mapped: bool = True) -> Parts:
    """The text encoders of `load_model` by themselves. The denoiser is a `meta_model`, and there is no autoencoder.

    Without `name`, `encoder_files` has all of them, and there is neither denoiser nor source.

    Raises: UserError: as `load_model`.
    """
    if not name:
        encoders = {part: _load_encoder(Path(encoder_files[part]), part, mapped=mapped) for part in FLAGS}
        return Parts(None, encoders, None, None)
    denoiser, source = _load_denoiser(name, encoder_files, mapped=mapped, weights=False)
    encoders = {part: load_encoder(source, part, mapped=mapped) for part in FLAGS}
    _check_widths(denoiser, encoders)
    return Parts(denoiser, encoders, None, source)


def encoder_file_options(family: FluxOptions) -> dict[str, str]:
    """The files of text encoders that the options give, by part."""
    return {part: file for part, option in FLAGS.items() if (file := getattr(family, option))}


def _check_widths(denoiser: nn.Module, encoders: Mapping[str, nn.Module]) -> None:
    config = denoiser.config
    for part, width, wanted in (
        ("te1", encoders["te1"].config.hidden_size, config.pooled_projection_dim),
        ("te3", encoders["te3"].config.d_model, config.joint_attention_dim),
    ):
        if width != wanted:
            raise UserError(
                f"{TITLES[part]} has width {width}, the model needs {wanted}; give the {TITLES[part]} that "
                f"belongs to it with --{FLAGS[part]}"
            )


# --- the denoiser -----------------------------------------------------------------------------------------------------


def _load_denoiser(
    name: str, given: Mapping[str, str], *, mapped: bool, weights: bool = True
) -> tuple[nn.Module, Source]:
    """The denoiser, or without `weights` its `meta_model`, and where everything comes from."""
    if Path(name).is_file():
        return _load_file(name, given, mapped, weights)
    return _load_folder(name, given, weights)


def _load_file(name: str, given: Mapping[str, str], mapped: bool, with_weights: bool) -> tuple[nn.Module, Source]:
    with error_prefix(name):
        weights = open_model(Path(name), mapped=mapped)
        reader = Reader(weights, None)
        denoiser, shape = transformer_of_file(reader, with_weights=with_weights)
    source = Source(
        name=name,
        variant=variant(shape.guidance),
        origins={part: given.get(part, name) for part in (*FLAGS, "vae")},
        prefix=shape.prefix,
        diffusers=shape.diffusers,
        tensor_specs=reader.tensor_specs,
        preserved=tuple(key for key in weights if key not in reader.tensor_specs),
        counters=counters(weights),
        file_kind=file_kind(weights),
    )
    return denoiser, source


def transformer_of_file(reader: Reader, *, with_weights: bool = True) -> tuple[nn.Module, FluxShape]:
    """The denoiser, or its `meta_model`. Raises: UserError: another kind of model, or an incomplete one."""
    from diffusers import FluxTransformer2DModel

    weights = reader.weights
    problem = mismatch(weights)
    if problem:
        raise UserError(problem)
    shape = flux_shape(weights.shapes)
    problem = channels_problem(shape.in_channels)
    if problem:
        raise UserError(problem)
    make = partial(FluxTransformer2DModel, **shape.diffusers_config())
    if not with_weights:
        return meta_model(make), shape
    others = (AE, "text_encoders.")
    keys = [key for key in weights if key.startswith(shape.prefix) and not key.startswith(others)]
    tensors = _converted(reader, flux_map(shape.prefix, diffusers=shape.diffusers), keys)
    return build(make, tensors, "the transformer"), shape


def _converted(reader: Reader, keys: KeyMap, names: Iterable[str]) -> dict[str, Tensor]:
    """The file's tensors under the model's names, one after the other: a model of 24 GB has no room for a copy."""
    tensors: dict[str, Tensor] = {}
    unknown = []
    for name in names:
        if is_scale(name):
            reader.take([name])  # so that it counts as used
            continue
        entry = keys.by_file(name)
        if entry is None:
            unknown.append(name)
            continue
        tensors.update(zip(entry.models, entry.rule.split(reader.take([name])[name]), strict=True))
    if unknown:
        raise KeyMapError(f"{len(unknown)} tensors have unknown names", unknown)
    return tensors


def _load_folder(name: str, given: Mapping[str, str], with_weights: bool) -> tuple[nn.Module, Source]:
    from diffusers import FluxTransformer2DModel

    require_model_name(name)
    parts = ("transformer", *FOLDERS.values(), "vae", *TOKENIZERS.values(), "scheduler")
    without_weights = () if with_weights else ("transformer", "vae")
    folder = Path(name) if Path(name).is_dir() else hub_folder(name, parts, folder_problem, without_weights)
    with error_prefix(name):
        problem = folder_problem(folder)
        if problem:
            raise UserError(problem)
        dtypes = folder_dtypes(folder, ("transformer", *FOLDERS.values(), "vae"))
        if with_weights:
            denoiser = from_pretrained(FluxTransformer2DModel, str(folder), "transformer", dtypes.get("transformer"))
        else:
            denoiser = meta_model_of_folder(FluxTransformer2DModel, str(folder), "transformer")
    source = Source(
        name=name,
        variant=variant(denoiser.config.guidance_embeds),
        origins={part: given.get(part, str(folder)) for part in (*FLAGS, "vae")},
        folder=str(folder),
        part_dtypes=dtypes,
    )
    return denoiser, source


# --- text encoders and autoencoder ------------------------------------------------------------------------------------


def load_encoder(source: Source, part: str, *, mapped: bool = True) -> nn.Module:
    """The text encoder "te1" (CLIP-L) or "te3" (T5), from where the source says.

    Raises: UserError: missing, unreadable, or not this encoder.
    """
    origin = source.origins[part]
    return _load_encoder(Path(origin), part, mapped=mapped, is_model=origin == source.name)


def _load_encoder(origin: Path, part: str, *, mapped: bool, is_model: bool = False) -> nn.Module:
    """`is_model`: the file is the one that the denoiser is in."""
    if origin.is_dir():
        from transformers import CLIPTextModel

        dtype = folder_dtype(origin / FOLDERS[part])
        if part == "te3":
            return t5_from_folder(origin, FOLDERS[part], dtype)
        return from_pretrained(CLIPTextModel, str(origin), FOLDERS[part], dtype)
    with error_prefix(origin):
        weights = open_model(origin, mapped=mapped)
        prefix = encoder_prefix(weights, part, inside=is_model)
        if prefix is None:
            problem = encoder_problem(weights, part)
            raise UserError(f"holds no {TITLES[part]}; give its file with --{FLAGS[part]}" if is_model else problem)
        return encoder_of_file(weights, part, prefix)


def encoder_of_file(weights: Weights, part: str, prefix: str) -> nn.Module:
    """A text encoder whose names in a file begin with `prefix`. Raises: UserError: it is incomplete."""
    inside = _Inside(weights, prefix)
    reader = Reader(inside, None)
    if part == "te3":
        return build_t5(reader.take(t5_keys(inside)), "T5")
    names = [k for k in inside if public_name(k).startswith("text_model.") and not k.endswith("position_ids")]
    tensors = {public_name(key): tensor for key, tensor in reader.take(names).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return build_clip(tensors, clip_config(shapes, hidden_act="quick_gelu", pad_id=49407), "CLIP-L")


def load_vae_alone(opts: Options) -> nn.Module:
    """The autoencoder that the options name, without its model, as `load_model` would return it.

    Raises: UserError: missing, unreadable, or another kind of VAE.
    """
    model = opts.model.pretrained_model_name_or_path
    return _load_ae(vae_origin(opts.family.ae, model, "--ae"), model)


def load_ae(source: Source) -> nn.Module:
    """The autoencoder, in float32. Raises: UserError: missing, unreadable, or another kind of VAE."""
    return _load_ae(source.origins["vae"], source.name)


def _load_ae(origin: str, model: str | None) -> nn.Module:
    if Path(origin).is_file():
        weights = open_weights(origin)
        if any(key.startswith(AE) for key in weights):
            with error_prefix(origin):
                return vae_from_file(_Inside(weights, AE), SCALING_FACTOR, SHIFT_FACTOR)[0]
        if origin == model and recognise(weights) == FLUX:
            raise UserError(f"{origin}: holds no autoencoder; give its file with --ae")
    facts = {"channels": CHANNELS, "scaling_factor": SCALING_FACTOR, "shift_factor": SHIFT_FACTOR}
    return load_vae(origin, kinds=(FLUX,), **facts)[0]


class _Inside(Mapping[str, "Tensor"]):
    """The tensors of an open file whose names begin with a prefix, under what follows it."""

    def __init__(self, weights: Weights, prefix: str):
        self._weights, self._prefix = weights, prefix
        names = [key.removeprefix(prefix) for key in weights if key.startswith(prefix)]
        self.shapes = {name: weights.shapes[prefix + name] for name in names}

    def __getitem__(self, key: str) -> Tensor:
        return self._weights[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
