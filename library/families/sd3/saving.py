"""Writes Stable Diffusion 3/3.5 models: single files, text encoders' own files, and Diffusers folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.keymap import Each, KeyMap, Rename
from library.checkpoints.writing import materialise, write_safetensors, write_torch
from library.families.sd3.keymap import ENCODERS, mmdit_map
from library.families.sd3.loading import PROJECTION, VAE_FACTS, Source, load_encoder
from library.families.sd3.options import SAMPLING_SHIFT
from library.families.sd3.variants import FLAGS, FOLDERS, TOKENIZERS
from library.families.shared.clip import public_state
from library.families.shared.reading import load_vae
from library.families.shared.t5 import COPY, EMBEDDING, save_t5, t5_state
from library.families.shared.vae import vae_map
from library.families.shared.writing import (
    deferred_part,
    save_clip,
    save_scheduler,
    write_model,
    write_model_index,
)
from library.text.tokenizers import save_clip_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.families.shared.writing import FileTensors
    from library.types import Models


def save_model(
    models: Models,
    path: Path,
    *,
    save_as: str,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    separate: Iterable[str] = (),
) -> None:
    """Writes a whole model; an earlier `path` survives a failure.

    A single file has the denoiser and whatever else its source had: VAE and text encoders. Of these, those that are no
    longer in memory are copied from the source. From a folder, it has the denoiser and the VAE.

    Args:
        models: as `load_model` made them.
        path: file or folder to write.
        save_as: ckpt, safetensors, diffusers or diffusers_safetensors.
        dtype: of every tensor of the model in a single file; None keeps what each had in the source. A Diffusers
            folder has the dtype of the models in memory.
        metadata: goes into a .safetensors file.
        separate: names of text encoders that are also written to files of their own, `<name>_clip_l.safetensors`, ...
    Raises: UserError: an unknown format. OSError: it cannot be written.
    """
    source: Source = models.source
    write_model(
        path,
        source,
        save_as=save_as,
        dtype=dtype,
        metadata=metadata,
        tensors=partial(file_tensors, models, dtype),
        fill=partial(_fill_folder, models),
        copied=[*source.tensor_specs, *source.preserved] if source.is_file else (),
    )
    if save_as.startswith("diffusers"):
        return
    for part in separate:
        if part in models.text_encoders:
            write_encoder(models.text_encoders[part], part, source, encoder_path(path, part), dtype, metadata)


# --- single files -----------------------------------------------------------------------------------------------------


def file_tensors(models: Models, dtype: torch.dtype | None) -> FileTensors:
    """All tensors of the models in memory under a single file's names; each is converted when it is written."""
    source: Source = models.source
    how = {"tensor_specs": source.tensor_specs, "dtype": dtype}
    keys = mmdit_map(models.denoiser.config.num_layers, source.prefix)
    tensors = deferred_part(
        keys, models.denoiser.state_dict(), folder_dtype=source.part_dtypes.get("transformer"), **how
    )
    if "vae" in source.parts:
        vae = _vae(models)
        keys = vae_map(len(vae.config.block_out_channels))
        tensors |= deferred_part(keys, vae.state_dict(), folder_dtype=source.part_dtypes.get("vae"), **how)
    for part in source.parts & models.text_encoders.keys():
        tensors |= _encoder_tensors(models.text_encoders[part], part, source, ENCODERS[part], dtype)
    return tensors


def _encoder_tensors(
    encoder: nn.Module, part: str, source: Source, prefix: str, dtype: torch.dtype | None
) -> FileTensors:
    """A text encoder under `prefix`, as far as its source had the names."""
    inside = ENCODERS[part]
    had = {key.removeprefix(inside): spec for key, spec in source.tensor_specs.items() if key.startswith(inside)}
    if part == "te3":
        state = t5_state(encoder)
        if COPY in had:  # files may have the embedding under either name, or under both
            state[COPY] = state[EMBEDDING]
            if EMBEDDING not in had:
                del state[EMBEDDING]
    else:
        state = public_state(encoder)
        if had and PROJECTION not in had:
            del state[PROJECTION]  # it was made when the file was read, and does nothing
    keys = KeyMap(Each(prefix, "", Rename("{rest}", "{rest}"))) if prefix else KeyMap(Rename("{rest}", "{rest}"))
    tensor_specs = {prefix + name: spec for name, spec in had.items()}
    folder_dtype = source.part_dtypes.get(FOLDERS[part])
    return deferred_part(keys, state, tensor_specs=tensor_specs, folder_dtype=folder_dtype, dtype=dtype)


def encoder_path(path: Path, part: str) -> Path:
    """The file of a text encoder beside a model's file: `<name>_clip_l.safetensors`."""
    return path.with_name(f"{path.stem}_{FLAGS[part]}{path.suffix}")


def write_encoder(
    encoder: nn.Module,
    part: str,
    source: Source,
    path: Path,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> None:
    """Writes a text encoder to a file of its own, with transformers' names."""
    tensors = _encoder_tensors(encoder, part, source, "", dtype)
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors, metadata)
    else:
        write_torch(path, {key: materialise(value) for key, value in tensors.items()})


def _vae(models: Models) -> nn.Module:
    """The VAE; one that was dropped since it was loaded is read again. Raises: UserError: the model has none."""
    if models.vae is not None:
        return models.vae
    return load_vae(models.source.vae_name, **VAE_FACTS)[0]


# --- Diffusers folders ------------------------------------------------------------------------------------------------


def _fill_folder(models: Models, folder: Path, safe: bool) -> None:
    """Writes what StableDiffusion3Pipeline.from_pretrained loads, with the text encoders that were given.

    Parts that are no longer in memory are read from their source again.

    Args:
        safe: .safetensors weights, else .bin.
    Raises: UserError: such a source is gone, or there never was a VAE.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    source: Source = models.source
    parts: dict[str, Any] = {"image_encoder": None, "feature_extractor": None}
    models.denoiser.save_pretrained(folder / "transformer", safe_serialization=safe)
    parts["transformer"] = ("diffusers", "SD3Transformer2DModel")
    _vae(models).save_pretrained(folder / "vae", safe_serialization=safe)
    parts["vae"] = ("diffusers", "AutoencoderKL")
    for part, place in FOLDERS.items():
        parts[place] = parts[TOKENIZERS[part]] = None
        if part not in source.encoder_names:
            continue
        encoder, tokenizer = models.text_encoders.get(part), models.tokenizers[part]
        if encoder is None:
            encoder, _ = load_encoder(source.encoder_names[part], part)
        if part == "te3":
            save_t5(encoder, folder / place, safe=safe)
            tokenizer.save_pretrained(folder / TOKENIZERS[part])
        else:
            save_clip(encoder, folder / place, safe=safe)
            save_clip_tokenizer(tokenizer, folder / TOKENIZERS[part])
        parts[place] = ("transformers", type(encoder).__name__)
        parts[TOKENIZERS[part]] = ("transformers", "T5TokenizerFast" if part == "te3" else "CLIPTokenizer")
    name = save_scheduler(
        source.folder or "", folder / "scheduler", lambda: FlowMatchEulerDiscreteScheduler(shift=SAMPLING_SHIFT)
    )
    parts["scheduler"] = ("diffusers", name)
    write_model_index(folder, "StableDiffusion3Pipeline", parts)
