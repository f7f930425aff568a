"""Whole models between single files and Diffusers folders: tools/convert_diffusers20_original_sd.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from library.checkpoints.reading import read_metadata
from library.errors import UserError
from library.model_tools.output import require_finite, require_output, require_room
from library.model_tools.recipes import modelspec, of_whole_model
from library.model_tools.weights import dtype_of
from library.options.base import Options
from library.options.logging import ConsoleOptions
from library.options.model_files import ConvertModelOptions
from library.runtime.files import reason
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    import torch

    from library.types import Models

GROUPS = (ConvertModelOptions, ConsoleOptions)
_FORMATS = {".safetensors": "safetensors", ".ckpt": "ckpt", ".pt": "ckpt"}  # of files, by their endings


class Loaded(Protocol):
    """A loaded model that can be written in every layout, see `library.families`."""

    models: Models
    v_prediction: bool | None

    @property
    def facts(self) -> dict[str, Any]: ...

    def save(
        self, path: Path, *, save_as: str, dtype: torch.dtype | None, metadata: dict[str, str], linear: bool
    ) -> None: ...


def convert_model(load: Callable[..., Loaded], opts: Options) -> None:
    """Writes the model `model_to_load` as `model_to_save`, a file or a Diffusers folder by its ending.

    Raises: UserError: a model that cannot be read or is of another kind, or a result that cannot be written.
    """
    chosen = opts.convert
    path, source = Path(chosen.model_to_save), Path(chosen.model_to_load)
    save_as = _FORMATS.get(path.suffix.lower())
    if save_as is None:
        save_as = "diffusers_safetensors" if chosen.use_safetensors else "diffusers"
        _require_folder(path, source)
    else:
        require_output("model_to_save", path, [source], _FORMATS)
    _warn_of_options(chosen, save_as, source)
    v2 = True if chosen.v2 else False if chosen.v1 else None
    model = load(str(source), v2=v2, variant=chosen.variant, reference=chosen.reference_model)
    if model.v_prediction is None and save_as.startswith("diffusers"):
        LOGGER.warning(
            "%s does not say whether it predicts noise or v; the scheduler is written for noise. Give the folder of "
            "such a model as --reference_model",
            source,
        )
    metadata = dict(read_metadata(source)) if source.is_file() else {}
    metadata |= {**modelspec(path, of_whole_model(model.facts), {}), **chosen.added_metadata()}
    if save_as == "ckpt":
        metadata = {"ss_epoch": str(chosen.epoch), "ss_steps": str(chosen.global_step)}
    linear, dtype = chosen.unet_use_linear_projection, dtype_of(chosen.precision)
    _require_sound(model.models, dtype, path)
    try:
        model.save(path, save_as=save_as, dtype=dtype, metadata=metadata, linear=linear)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({reason(error)}); what was there is as it was") from None
    LOGGER.info("wrote %s", path)


def _require_sound(models: Models, dtype: torch.dtype | None, path: Path) -> None:
    """Raises: UserError: there is no room for the model, or a weight is NaN or infinite in the precision asked for."""
    size = 0
    for module in (*models.text_encoders.values(), models.denoiser, models.vae):
        for name, tensor in module.state_dict().items() if module is not None else ():
            kept = tensor.to(dtype or tensor.dtype) if tensor.is_floating_point() else tensor
            require_finite(name, kept)
            size += kept.nbytes
    require_room(path, size if dtype is not None else size // 2)  # what is read may be stored in half of that


def _require_folder(path: Path, source: Path) -> None:
    """Raises: UserError: the folder is that of the model, or holds something else than a Diffusers model."""
    if path.is_file():
        raise UserError(f"model_to_save: {path} is a file; end the name in .safetensors or .ckpt to write a file")
    if path.is_dir():
        if source.exists() and path.samefile(source):
            raise UserError(f"model_to_save: {path} would replace what is read; give another name")
        if os.listdir(path) and not (path / "model_index.json").is_file():
            raise UserError(
                f"model_to_save: the folder {path} holds something else than a Diffusers model; name a new one"
            )


def _warn_of_options(chosen: ConvertModelOptions, save_as: str, source: Path) -> None:
    """A line for each option that has no effect on this conversion."""
    folder = save_as.startswith("diffusers")
    idle = {
        "metadata": chosen.metadata is not None and save_as != "safetensors",
        "epoch": chosen.epoch and save_as != "ckpt",
        "global_step": chosen.global_step and save_as != "ckpt",
        "use_safetensors": chosen.use_safetensors and not folder,
        "reference_model": chosen.reference_model is not None and not folder,
        "unet_use_linear_projection": chosen.unet_use_linear_projection and not folder,
        "variant": chosen.variant is not None and source.is_file(),
    }
    for name in (name for name, is_idle in idle.items() if is_idle):
        LOGGER.warning("--%s: has no effect on this conversion", name)
