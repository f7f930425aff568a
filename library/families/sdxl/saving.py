"""Writes SDXL models: single files and Diffusers folders."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.families.sdxl.keymap import text1_map, text2_map
from library.families.sdxl.loading import Source, load_vae
from library.families.sdxl.spec import FOLDERS
from library.families.shared.clip import public_state
from library.families.shared.markers import V_PRED, ZTSNR, without_markers
from library.families.shared.recognition import read_json
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
    zero_terminal_snr: bool | None = None,
) -> None:
    """Writes a whole model; an earlier `path` survives a failure.

    Args:
        models: as `load_model` made them; a VAE that was dropped since is read from its source again.
        path: file or folder to write.
        save_as: one of `shared.writing.FORMATS`.
        dtype: of every tensor of the model in a single file; None keeps what each had in the source. A Diffusers
            folder has the dtype of the models in memory, whatever this says: so do other trainers.
        metadata: goes into a .safetensors file; a .ckpt has only `ss_epoch` and `ss_steps`, added to its source's.
        v_prediction, zero_terminal_snr: what a single file is marked with, and a new Diffusers folder's scheduler;
            None: the file keeps the markers of its source.
    Raises: UserError: an unknown format. OSError: it cannot be written.
    """
    import torch

    source: Source = models.source
    vae = models.vae if models.vae is not None else load_vae(source.vae_name)[0]
    facts = {V_PRED: v_prediction, ZTSNR: zero_terminal_snr}
    # Empty tensors, by whose names user interfaces know how to sample the model.
    markers = {marker: torch.zeros(0) for marker, is_true in facts.items() if is_true}
    write_model(
        path,
        source,
        save_as=save_as,
        dtype=dtype,
        metadata=metadata,
        tensors=lambda: file_tensors(models, vae, dtype) | markers,
        fill=partial(_fill_folder, models, vae, bool(v_prediction), bool(zero_terminal_snr)),
        copied=without_markers(source.preserved, facts),
    )


def file_tensors(models: Models, vae: nn.Module, dtype: torch.dtype | None) -> FileTensors:
    """All tensors of the models under a single file's names; each is converted when it is written."""
    source: Source = models.source
    te1, te2 = models.text_encoders["te1"], models.text_encoders["te2"]
    parts = (
        ("unet", map_of_config(models.denoiser.config), models.denoiser.state_dict()),
        ("vae", vae_map(len(vae.config.block_out_channels)), vae.state_dict()),
        ("text_encoder", text1_map(), public_state(te1)),
        ("text_encoder_2", text2_map(source.projection), public_state(te2)),
    )
    tensors: FileTensors = {}
    for part, keys, state in parts:
        folder_dtype = source.part_dtypes.get(part)
        tensors |= deferred_part(keys, state, tensor_specs=source.tensor_specs, folder_dtype=folder_dtype, dtype=dtype)
    return tensors


def _fill_folder(
    models: Models, vae: nn.Module, v_prediction: bool, zero_terminal_snr: bool, folder: Path, safe: bool
) -> None:
    """Writes what StableDiffusionXLPipeline.from_pretrained loads."""
    from diffusers import EulerDiscreteScheduler

    published = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    published |= {"prediction_type": "v_prediction" if v_prediction else "epsilon"}
    published |= {"timestep_spacing": "leading", "rescale_betas_zero_snr": zero_terminal_snr}
    if zero_terminal_snr:
        published["timestep_spacing"] = "trailing"  # only this one begins in pure noise
    source: Source = models.source
    models.denoiser.save_pretrained(folder / "unet", safe_serialization=safe)
    vae.save_pretrained(folder / "vae", safe_serialization=safe)
    for name, subfolder in FOLDERS.items():
        save_clip(models.text_encoders[name], folder / subfolder, safe=safe)
        save_clip_tokenizer(models.tokenizers[name], folder / subfolder.replace("text_encoder", "tokenizer"))
    scheduler = save_scheduler(source.name, folder / "scheduler", lambda: EulerDiscreteScheduler(**published))
    index = Path(source.name) / "model_index.json"
    old = read_json(index) if index.is_file() else {}
    parts = {
        "feature_extractor": None,
        "force_zeros_for_empty_prompt": old.get("force_zeros_for_empty_prompt", True),
        "image_encoder": None,
        "scheduler": ("diffusers", scheduler),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    write_model_index(folder, f"StableDiffusionXL{'Inpaint' if models.inpaints else ''}Pipeline", parts)
