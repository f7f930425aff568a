"""Writes Stable Diffusion 1.x/2.x models: single files and Diffusers folders."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.families.sd.keymap import OPEN_CLIP, text_map
from library.families.sd.loading import Source, load_vae
from library.families.shared.clip import public_state
from library.families.shared.markers import MARKERS, without_markers
from library.families.shared.open_clip import unused_layers
from library.families.shared.unet import map_of_config
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
    v_prediction: bool | None = None,
    scheduler_from: str | None = None,
) -> None:
    """Writes a whole model; an earlier `path` survives a failure.

    Args:
        models: as `load_model` made them; a VAE that was dropped since is read from its source again.
        path: file or folder to write.
        save_as: one of `shared.writing.FORMATS`.
        dtype: of every tensor of the model in a single file; None keeps what each had in the source. A Diffusers
            folder has the dtype of the models in memory, whatever this says: so do other trainers.
        metadata: goes into a .safetensors file; a .ckpt has only `ss_epoch` and `ss_steps`, added to its source's.
        v_prediction: prediction type of a new Diffusers folder's scheduler. Where it is False, a file loses the
            markers of a model that predicts v.
        scheduler_from: Diffusers folder whose scheduler a new folder gets; the source's, if not given.
    Raises: UserError: an unknown format. OSError: it cannot be written.
    """
    source: Source = models.source
    vae = models.vae if models.vae is not None else load_vae(source.vae_name)[0]
    write_model(
        path,
        source,
        save_as=save_as,
        dtype=dtype,
        metadata=metadata,
        tensors=partial(file_tensors, models.denoiser, models.text_encoders["te"], vae, source, dtype),
        fill=partial(_fill_folder, models, vae, bool(v_prediction), scheduler_from or source.name),
        copied=without_markers(source.preserved, dict.fromkeys(MARKERS, v_prediction)),
    )


# --- single files -----------------------------------------------------------------------------------------------------


def file_tensors(
    denoiser: nn.Module, text_encoder: nn.Module, vae: nn.Module, source: Source, dtype: torch.dtype | None
) -> FileTensors:
    """All tensors of the models under a single file's names; each is converted when it is written."""
    parts = (
        ("unet", map_of_config(denoiser.config), denoiser.state_dict()),
        ("vae", vae_map(len(vae.config.block_out_channels)), vae.state_dict()),
        ("text_encoder", text_map(source.v2, source.text_model_level), public_state(text_encoder)),
    )
    tensors: FileTensors = {}
    for part, keys, state in parts:
        folder_dtype = source.part_dtypes.get(part)
        tensors |= deferred_part(keys, state, tensor_specs=source.tensor_specs, folder_dtype=folder_dtype, dtype=dtype)
    if source.v2 and not source.is_file:
        tensors |= unused_layers(tensors, OPEN_CLIP, text_encoder.config.num_hidden_layers)
    return tensors


# --- Diffusers folders ------------------------------------------------------------------------------------------------


def _fill_folder(
    models: Models, vae: nn.Module, v_prediction: bool, scheduler_from: str, folder: Path, safe: bool
) -> None:
    """Writes what StableDiffusionPipeline.from_pretrained loads.

    Args:
        v_prediction: for the scheduler, unless `scheduler_from` is a folder that has one.
        safe: .safetensors weights, else .bin.
    """
    from diffusers import DDIMScheduler

    published = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    published |= {"clip_sample": False, "set_alpha_to_one": False}
    published |= {"prediction_type": "v_prediction" if v_prediction else "epsilon"}
    models.denoiser.save_pretrained(folder / "unet", safe_serialization=safe)
    vae.save_pretrained(folder / "vae", safe_serialization=safe)
    save_clip(models.text_encoders["te"], folder / "text_encoder", safe=safe)
    save_clip_tokenizer(models.tokenizers["te"], folder / "tokenizer")
    scheduler = save_scheduler(scheduler_from, folder / "scheduler", lambda: DDIMScheduler(**published))
    parts = {
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
        "safety_checker": None,
        "scheduler": ("diffusers", scheduler),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    write_model_index(folder, f"StableDiffusion{'Inpaint' if models.inpaints else ''}Pipeline", parts)
