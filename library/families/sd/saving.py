"""Writes Stable Diffusion 1.x/2.x models: single files and Diffusers folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.keymap import Entry, KeyMap
from library.checkpoints.reading import open_weights
from library.checkpoints.writing import Deferred, materialise, replacing_folder, write_safetensors, write_torch
from library.errors import UserError
from library.families.sd.keymap import OPEN_CLIP, text_map, unet_map, vae_map
from library.families.sd.loading import Source, load_vae
from library.families.shared.clip import public_state
from library.runtime.logs import LOGGER
from library.text.tokenizers import save_clip_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.types import Models

    FileTensors = dict[str, Tensor | Deferred]

FORMATS = ("ckpt", "safetensors", "diffusers", "diffusers_safetensors")


def save_model(
    models: Models,
    path: Path,
    *,
    save_as: str,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    v_prediction: bool = False,
) -> None:
    """Writes a whole model; an earlier `path` survives a failure.

    Args:
        models: as `load_model` made them; a VAE that was dropped since is read from its source again.
        path: file or folder to write.
        save_as: one of `FORMATS`.
        dtype: of every tensor of the model in a single file; None keeps what each had in the source. A Diffusers
            folder has the dtype of the models in memory, whatever this says: so do other trainers.
        metadata: goes into a .safetensors file; a .ckpt has only `ss_epoch` and `ss_steps`, added to its source's.
        v_prediction: what a new Diffusers folder's scheduler is told to expect.
    Raises: UserError: an unknown format. OSError: it cannot be written.
    """
    if save_as not in FORMATS:
        raise UserError(f"--save_model_as {save_as}: choose one of {', '.join(FORMATS)}")
    source: Source = models.source
    vae = models.vae if models.vae is not None else load_vae(source.vae_name)[0]
    if save_as.startswith("diffusers"):
        if dtype is not None:
            LOGGER.info("--save_precision acts on single files only; the Diffusers folder keeps the models' precision")
        save_folder(models, vae, path, safe=save_as == "diffusers_safetensors", v_prediction=v_prediction)
        return
    tensors = file_tensors(models.denoiser, models.text_encoders["te"], vae, source, dtype)
    tensors.update(_preserved(source, tensors))
    if save_as == "safetensors":
        write_safetensors(path, tensors, metadata)
        return
    counters = {"epoch": int(metadata.get("ss_epoch", 0)), "global_step": int(metadata.get("ss_steps", 0))}
    counters = {name: value + source.counters.get(name, 0) for name, value in counters.items()}
    write_torch(path, {"state_dict": {key: materialise(value) for key, value in tensors.items()}, **counters})


# --- single files -----------------------------------------------------------------------------------------------------


def file_tensors(
    denoiser: nn.Module, text_encoder: nn.Module, vae: nn.Module, source: Source, dtype: torch.dtype | None
) -> FileTensors:
    """Everything that the models hold, under a single file's names; each tensor is converted when it is written."""
    config = denoiser.config
    attention = tuple("CrossAttn" in block for block in config.down_block_types)
    parts: list[tuple[str, KeyMap, Mapping[str, Tensor]]] = [
        ("unet", unet_map(len(attention), config.layers_per_block, attention), denoiser.state_dict()),
        ("vae", vae_map(len(vae.config.block_out_channels)), vae.state_dict()),
        ("text_encoder", text_map(source.v2, source.text_model_level), public_state(text_encoder)),
    ]
    tensors: FileTensors = {}
    for part, keys, state in parts:
        for entry in keys.entries(state):
            tensors[entry.file] = _deferred(entry, state, source, part, dtype)
    if source.v2 and not source.is_file:
        tensors.update(_open_clip_remainder(tensors, text_encoder.config.num_hidden_layers))
    return tensors


def _deferred(
    entry: Entry, state: Mapping[str, Tensor], source: Source, part: str, dtype: torch.dtype | None
) -> Deferred:
    live = [state[name].detach() for name in entry.models]
    shape = tuple(entry.rule.join([tensor.to("meta") for tensor in live]).shape)
    old_dtype, old_shape = source.forms.get(entry.file, (source.part_dtypes.get(part, live[0].dtype), shape))
    if _volume(old_shape) == _volume(shape):
        shape = old_shape  # 1x1 convolutions may be stored flat or not; keep the file's way
    kept = dtype or old_dtype

    def make() -> Tensor:
        return entry.rule.join([tensor.cpu() for tensor in live]).reshape(shape).to(kept)

    return Deferred(kept, shape, make)


def _volume(shape: tuple[int, ...]) -> int:
    volume = 1
    for side in shape:
        volume *= side
    return volume


def _open_clip_remainder(tensors: FileTensors, layers: int) -> FileTensors:
    """What OpenCLIP has and SD 2.x never runs: the last layer and the projection. Readers count on their presence."""
    import torch

    last, extra = f"{OPEN_CLIP}transformer.resblocks.{layers - 1}.", f"{OPEN_CLIP}transformer.resblocks.{layers}."
    remainder: FileTensors = {
        extra + key.removeprefix(last): value for key, value in tensors.items() if key.startswith(last)
    }
    embedding = tensors[f"{OPEN_CLIP}token_embedding.weight"]
    width = embedding.shape[1]
    remainder[f"{OPEN_CLIP}text_projection"] = torch.ones(width, width, dtype=embedding.dtype)
    remainder[f"{OPEN_CLIP}logit_scale"] = torch.tensor(1.0, dtype=embedding.dtype)
    return remainder


def _preserved(source: Source, written: Mapping[str, Any]) -> FileTensors:
    """The source file's tensors that the model does not use, exactly as they are."""
    keys = [key for key in source.preserved if key not in written]
    if not keys:
        return {}
    try:
        weights = open_weights(source.name)
    except UserError as error:
        LOGGER.warning(f"saving without the {len(keys)} tensors that training does not use: {error}")
        return {}
    tensors: FileTensors = {}
    for key in keys:
        if key in weights:
            tensors[key] = Deferred(weights.dtype(key), weights.shapes[key], lambda key=key: weights[key])
    return tensors


# --- Diffusers folders ------------------------------------------------------------------------------------------------


def save_folder(models: Models, vae: nn.Module, path: Path, *, safe: bool, v_prediction: bool) -> None:
    """Writes a folder that StableDiffusionPipeline.from_pretrained loads.

    Args:
        safe: .safetensors weights, else .bin.
        v_prediction: for the scheduler, unless the source is a folder with a scheduler of its own.
    """
    with replacing_folder(path) as folder:
        models.denoiser.save_pretrained(folder / "unet", safe_serialization=safe)
        vae.save_pretrained(folder / "vae", safe_serialization=safe)
        _save_text_encoder(models.text_encoders["te"], folder / "text_encoder", safe)
        save_clip_tokenizer(models.tokenizers["te"], folder / "tokenizer")
        _save_scheduler(models.source, folder / "scheduler", v_prediction)
        _write_json(folder / "model_index.json", _model_index(_scheduler_class(folder / "scheduler")))


def _save_text_encoder(text_encoder: nn.Module, folder: Path, safe: bool) -> None:
    """By hand, because transformers 5 writes names without `text_model.`, which nothing older can read."""
    folder.mkdir()
    text_encoder.config.architectures = ["CLIPTextModel"]
    text_encoder.config.to_json_file(folder / "config.json")
    state = {name: materialise(tensor) for name, tensor in public_state(text_encoder).items()}
    if safe:
        write_safetensors(folder / "model.safetensors", state, {"format": "pt"})
    else:
        write_torch(folder / "pytorch_model.bin", state)


def _save_scheduler(source: Source, folder: Path, v_prediction: bool) -> None:
    from diffusers import DDIMScheduler

    own = Path(source.name) / "scheduler" / "scheduler_config.json"
    if own.is_file():
        folder.mkdir()
        shutil.copyfile(own, folder / own.name)
        return
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if v_prediction else "epsilon",
    ).save_pretrained(folder)


def _scheduler_class(folder: Path) -> str:
    return json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))["_class_name"]


def _model_index(scheduler: str) -> dict[str, Any]:
    import diffusers

    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
