"""The metadata that trained files carry: how they were trained (ss_*), what they are (modelspec.*), hashes (sshs_*).

modelspec: Stability AI's Model Metadata Standard, version 1.0.1.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library import version
from library.checkpoints import hashes
from library.errors import UserError
from library.runtime.files import read_bytes, reason

if TYPE_CHECKING:
    from torch import Tensor

    from library.options.base import OptionGroup, Options

_KEPT_WITHOUT_METADATA = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "ss_train_inpainting",
)

# Options written as they are: ss_<option>, or with their own name behind "=". By option group.
# fmt: off
_FROM_OPTIONS = {
    "saving": ("output_name",),
    "training": ("seed", "gradient_accumulation_steps", "max_train_steps"),
    "memory": (
        "lowram", "gradient_checkpointing", "mixed_precision", "full_fp16", "fp8_base", "fp8_base_unet",
    ),
    "optimizer": ("learning_rate", "lr_scheduler", "lr_warmup_steps", "max_grad_norm"),
    "noise": (
        "noise_offset", "noise_offset_random_strength", "adaptive_noise_scale", "multires_noise_iterations",
        "multires_noise_discount", "ip_noise_gamma", "ip_noise_gamma_random_strength", "zero_terminal_snr",
    ),
    "loss": (
        "min_snr_gamma", "debiased_estimation=debiased_estimation_loss", "prior_loss_weight", "loss_type",
        "huber_schedule", "huber_scale", "huber_c",
    ),
    "data": (
        "cache_latents", "caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate",
        "face_crop_aug_range", "resize_interpolation",
    ),
    "validation": (
        "validation_seed", "validation_split", "max_validation_steps", "validate_every_n_epochs",
        "validate_every_n_steps",
    ),
}
# The same for data sets that command-line options describe; with a config file, `ss_datasets` says it.
_FROM_DATA_FLAGS = (
    "batch_size_per_device=train_batch_size", "color_aug", "flip_aug", "random_crop", "shuffle_caption",
    "enable_bucket", "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso", "keep_tokens",
)
_SPEC_OPTIONS = (
    "author", "description", "license", "tags", "usage_hint", "merged_from", "trigger_phrase", "preprocessor",
    "is_negative_embedding",
)
# fmt: on
_IMAGE_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
}
_LARGEST_THUMBNAIL = 16 << 20  # bytes; it becomes part of the header, which may have 100 MB
_TITLES = {"/lora": "LoRA", "/textual-inversion": "TextualInversion", "/controlnet": "ControlNet"}
# What the ancestor writes of embeddings where networks of the same family say "diffusers".
_EMBEDDING_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"


def training_metadata(
    opts: Options,
    family_meta: Mapping[str, Any],
    method_meta: Mapping[str, Any],
    data_meta: Mapping[str, Any],
    run_facts: Mapping[str, Any],
) -> dict[str, str]:
    """The metadata of a file, except its hashes (see `finalise`). Honours --no_metadata.

    Args:
        family_meta: `Writer.metadata`.
        method_meta: `Method.metadata`.
        data_meta: ss_* values of the data set; lists and dicts become JSON.
        run_facts: ss_* values of the run; `ss_training_finished_at` (unix time) also dates the file.
    The later mappings overrule the earlier ones, and all of them the options.
    Raises: UserError: the thumbnail cannot be read, or --resolution is no size.
    """
    values: dict[str, Any] = {"ss_sd_scripts_commit_hash": version.commit(), **_options_metadata(opts)}
    for name, key in ((opts.model.pretrained_model_name_or_path, "sd_model"), (opts.model.vae, "vae")):
        if not name:
            continue
        values[f"ss_{key}_name"] = name
        if os.path.exists(name):
            values[f"ss_{key}_name"] = os.path.basename(os.path.normpath(name))
            stat = os.stat(name)
            legacy, whole = _file_hashes(name, stat.st_mtime_ns, stat.st_size)
            values[f"ss_{key}_hash"], values[f"ss_new_{key}_hash"] = legacy, whole
    for source in (family_meta, method_meta, data_meta, run_facts):
        values.update({key: value for key, value in source.items() if key.startswith("ss_")})
    metadata = {}
    for key, value in values.items():
        is_table = isinstance(value, list) and any(isinstance(entry, dict) for entry in value)
        metadata[key] = json.dumps(value) if isinstance(value, dict) or is_table else str(value)
    metadata = with_modelspec(metadata, opts, {**family_meta, **method_meta})
    return minimal(metadata) if opts.metadata.no_metadata else metadata


def with_modelspec(metadata: Mapping[str, str], opts: Options, facts: Mapping[str, Any]) -> dict[str, str]:
    """`metadata` with the modelspec.* keys.

    Args:
        metadata: the ss_* values; `ss_training_finished_at` is the date, now if it is missing.
        facts: `modelspec.architecture`, `.implementation`, `.resolution` (default), `.prediction_type` or none, and
            `.suffix` of what is trained; perhaps `.whole`, the architecture where there is no suffix.
    Raises: UserError: the thumbnail cannot be read, or --resolution is no size.
    """
    given = {key.removeprefix("modelspec."): value for key, value in facts.items() if key.startswith("modelspec.")}
    suffix, whole = given.pop("suffix", ""), given.pop("whole", given["architecture"])
    if suffix == "/textual-inversion" and given.get("implementation") == "diffusers":
        given["implementation"] = _EMBEDDING_IMPLEMENTATION
    moment = float(metadata.get("ss_training_finished_at") or datetime.now().timestamp())
    options, low, high = opts.metadata, opts.noise.min_timestep, opts.noise.max_timestep
    timesteps = f"{0 if low is None else low},{1000 if high is None else high}"
    spec: dict[str, Any] = {
        "sai_model_spec": "1.0.1",
        **given,
        "architecture": f"{given['architecture']}{suffix}" if suffix else whole,
        "title": options.metadata_title or opts.saving.output_name or f"{_TITLES.get(suffix, 'Checkpoint')}@{moment}",
        "date": datetime.fromtimestamp(moment).replace(microsecond=0).isoformat(),
        "implementation_version": f"{version.NAME}/{version.VERSION}",
        "timestep_range": None if low is None and high is None else timesteps,
        "encoder_layer": getattr(opts.family, "clip_skip", None),
        **{name: getattr(options, f"metadata_{name}") for name in _SPEC_OPTIONS},
    }
    if opts.data.resolution is not None:
        spec["resolution"] = "{}x{}".format(*_size(opts.data.resolution))
    if options.metadata_thumbnail is not None:
        spec["thumbnail"] = data_url(options.metadata_thumbnail)
    return {**metadata, **{f"modelspec.{key}": str(value) for key, value in spec.items() if value is not None}}


def finalise(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`metadata` with the hashes of `tensors`, which must be on the CPU and cast to what is saved."""
    return {**metadata, **hashes.network_hashes(tensors, metadata)}


def minimal(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata that stays with --no_metadata: type of network and base model, modelspec and hashes."""
    return {
        key: value
        for key, value in metadata.items()
        if key in _KEPT_WITHOUT_METADATA or key.startswith(("modelspec.", "sshs_"))
    }


def data_url(path: str) -> str:
    """An image file as "data:<type>;base64,..."; such a text is given back as it is.

    Raises: UserError: unreadable, or not named like an image.
    """
    if path.startswith("data:"):
        return path
    suffix = Path(path).suffix.lower()
    if suffix not in _IMAGE_TYPES:
        raise UserError(f"--metadata_thumbnail: {path}: is not named {', '.join(_IMAGE_TYPES)}")
    try:
        content = read_bytes(path, _LARGEST_THUMBNAIL)
    except OSError as error:
        raise UserError(f"--metadata_thumbnail: {path}: {reason(error)}") from error
    return f"data:{_IMAGE_TYPES[suffix]};base64,{base64.b64encode(content).decode('ascii')}"


def _options_metadata(opts: Options) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for group, names in _FROM_OPTIONS.items():
        if opts.data.of_images or group not in ("data", "validation"):
            values.update(_named(getattr(opts, group), names))
    values.update({f"ss_{name}": getattr(opts.family, name, None) for name in ("clip_skip", "max_token_length")})
    if opts.data.of_images and opts.data.dataset_config is None:
        values.update(_named(opts.data, _FROM_DATA_FLAGS))
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        values["ss_total_batch_size"] = (
            opts.data.train_batch_size * processes * opts.training.gradient_accumulation_steps
        )
        values["ss_resolution"] = None if opts.data.resolution is None else _size(opts.data.resolution)
    return values


def _named(options: OptionGroup, names: Iterable[str]) -> dict[str, Any]:
    pairs = [name.partition("=") for name in names]
    return {f"ss_{key}": getattr(options, option or key) for key, _, option in pairs}


@lru_cache(maxsize=8)
def _file_hashes(path: str, _mtime: int, _size: int) -> tuple[str, str]:
    """A base model is hashed once in a run, not at every save, and again if it changes."""
    return hashes.legacy_file_hash(path), hashes.file_hash(path)


def _size(resolution: Any) -> tuple[int, int]:
    """--resolution, "512" or "512,768" or the numbers themselves, as (width, height)."""
    numbers = [int(number) for number in re.findall(r"\d+", str(resolution))]
    if len(numbers) not in (1, 2):
        raise UserError(f"--resolution: {resolution!r} is neither a side nor width,height")
    return numbers[0], numbers[-1]
