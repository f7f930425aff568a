"""Writes FLUX.1 models: the transformer's single file, and Diffusers folders."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.families.flux.keymap import flux_map
from library.families.flux.loading import Source, load_ae, load_encoder
from library.families.flux.variants import FOLDERS, TOKENIZERS
from library.families.shared.t5 import save_t5
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

    from library.types import Models


def save_model(
    models: Models, path: Path, *, save_as: str, dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    """Writes a whole model; an earlier `path` survives a failure.

    A single file holds the transformer, and what else was in a single source file, as it was there.

    Args:
        models: as `load_model` made them; parts that were dropped since are read from their sources again.
        path: file or folder to write.
        save_as: one of `writing.FORMATS`.
        dtype: of the transformer's tensors in a single file; None keeps what each had in the source. A Diffusers
            folder has the formats of the models in memory, whatever this says.
        metadata: goes into a .safetensors file; a .ckpt has only `ss_epoch` and `ss_steps`, added to its source's.
    Raises: UserError: an unknown format, or a dropped part that is gone. OSError: it cannot be written.
    """
    source: Source = models.source
    write_model(
        path,
        source,
        save_as=save_as,
        dtype=dtype,
        metadata=metadata,
        tensors=partial(
            deferred_part,
            flux_map(source.prefix, diffusers=source.diffusers),
            models.denoiser.state_dict(),
            tensor_specs=source.tensor_specs,
            folder_dtype=source.part_dtypes.get("transformer"),
            dtype=dtype,
        ),
        fill=partial(_fill_folder, models),
    )


def _fill_folder(models: Models, folder: Path, safe: bool) -> None:
    """Writes what FluxPipeline.from_pretrained loads.

    Args:
        safe: .safetensors weights, else .bin.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    source: Source = models.source
    dev = source.variant == "dev"
    published = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    published |= {"shift": 3.0 if dev else 1.0, "use_dynamic_shifting": dev}
    parts: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
    models.denoiser.save_pretrained(folder / "transformer", safe_serialization=safe)
    vae = models.vae if models.vae is not None else load_ae(source)
    vae.save_pretrained(folder / "vae", safe_serialization=safe)
    save_clip(_encoder(models, "te1"), folder / FOLDERS["te1"], safe=safe)
    save_t5(_encoder(models, "te3"), folder / FOLDERS["te3"], safe=safe)
    save_clip_tokenizer(models.tokenizers["te1"], folder / TOKENIZERS["te1"])
    models.tokenizers["te3"].save_pretrained(folder / TOKENIZERS["te3"])
    scheduler = save_scheduler(
        source.folder or "", folder / "scheduler", lambda: FlowMatchEulerDiscreteScheduler(**published)
    )
    parts["transformer"] = ("diffusers", "FluxTransformer2DModel")
    parts["vae"] = ("diffusers", "AutoencoderKL")
    parts[FOLDERS["te1"]] = ("transformers", "CLIPTextModel")
    parts[FOLDERS["te3"]] = ("transformers", "T5EncoderModel")
    parts[TOKENIZERS["te1"]] = ("transformers", "CLIPTokenizer")
    parts[TOKENIZERS["te3"]] = ("transformers", "T5TokenizerFast")
    parts["scheduler"] = ("diffusers", scheduler)
    write_model_index(folder, "FluxPipeline", parts)


def _encoder(models: Models, part: str) -> nn.Module:
    return models.text_encoders[part] if part in models.text_encoders else load_encoder(models.source, part)
