"""Stable Diffusion 1.x/2.x models from one layout to the other: single files and Diffusers folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.families.sd.loading import Source, load_model
from library.families.sd.saving import save_model
from library.families.sd.spec import SD2
from library.families.sd.tokenizer import sd_tokenizer
from library.families.sd.variants import ORIGINAL_CODE, folder_kind, model_facts
from library.families.shared.building import build
from library.families.shared.markers import V_PRED, stated
from library.families.shared.recognition import is_hub_id, recognise_file
from library.families.shared.unet import UNET, reads_masks
from library.families.shared.vae import VAE
from library.types import Models

if TYPE_CHECKING:
    import torch
    from torch import nn

_PROJECTIONS = ("proj_in.weight", "proj_out.weight")


@dataclass(frozen=True)
class Conversion:
    """A loaded model, and what is known of it for the file or folder that is written."""

    models: Models
    v_prediction: bool | None  # None: nothing says what it predicts
    reference: str | None  # Diffusers folder whose scheduler a new folder gets

    @property
    def facts(self) -> dict[str, Any]:
        """modelspec.* values of a single file."""
        facts = model_facts(self.models.source.v2, bool(self.v_prediction), inpaints=self.models.inpaints)
        return {**facts, "modelspec.implementation": ORIGINAL_CODE}

    def save(
        self, path: Path, *, save_as: str, dtype: torch.dtype | None, metadata: Mapping[str, str], linear: bool
    ) -> None:
        """Writes the model.

        Args:
            save_as: one of `shared.writing.FORMATS`.
            dtype: None keeps that of the model that was read; a Diffusers folder has one for each part.
            metadata: as `save_model` takes it.
            linear: 1x1 convolutions of the U-Net's transformers become linear layers in a Diffusers folder.
        Raises: UserError, OSError: see `save_model`.
        """
        models = self.models
        if save_as.startswith("diffusers"):
            if linear:
                models.denoiser = with_linear_projection(models.denoiser)
            for part, module in (("unet", models.denoiser), ("vae", models.vae), ("te", models.text_encoders["te"])):
                module.to(dtype or _own_dtype(models.source, part))
            dtype = None
        save_model(
            models,
            path,
            save_as=save_as,
            dtype=dtype,
            metadata=metadata,
            v_prediction=self.v_prediction,
            scheduler_from=self.reference,
        )


def load_for_conversion(
    name: str, *, v2: bool | None, variant: str | None = None, reference: str | None = None
) -> Conversion:
    """Loads a model on the CPU, in float32.

    Args:
        name: a single file, a Diffusers folder or a hub id.
        v2: whether it is a 2.x model; None: find out.
        variant: of a Diffusers model's weights.
        reference: Diffusers folder whose tokenizer and scheduler a new folder gets; by default the model's own.
    Raises: UserError: missing, unreadable, incomplete, or of another kind.
    """
    parts = load_model(name, find_v2(name) if v2 is None else v2, variant=variant, inpainting=True)
    source = parts.source
    tokenizer = sd_tokenizer(source.v2, reference or (None if source.is_file else name))
    models = Models(
        parts.denoiser,
        {"te": parts.text_encoder},
        {"te": tokenizer},
        parts.vae,
        source,
        inpaints=reads_masks(parts.denoiser),
    )
    return Conversion(models, _v_prediction(source, reference), reference)


def find_v2(name: str) -> bool:
    """Whether a model is of version 2.x, by its names and configuration. Raises: UserError: that cannot be seen."""
    path = Path(name)
    if path.is_dir():
        return folder_kind(path) == SD2
    if path.is_file():
        return recognise_file(path) == SD2
    if is_hub_id(name):
        raise UserError(f"{name}: give --v1 or --v2 for a model of the hub")
    raise UserError(f"{name}: no such file or folder (and not a hub id of the form owner/model)")


def with_linear_projection(denoiser: nn.Module) -> nn.Module:
    """The same U-Net with linear layers in place of 1x1 convolutions around its transformers."""
    from diffusers import UNet2DConditionModel

    state = denoiser.state_dict()
    flat = {name: value.flatten(1) if name.endswith(_PROJECTIONS) else value for name, value in state.items()}
    config = {**denoiser.config, "use_linear_projection": True}
    return build(partial(UNet2DConditionModel.from_config, config), flat, "the U-Net")


def _v_prediction(source: Source, reference: str | None) -> bool | None:
    """What the model predicts, by what its scheduler, markers or metadata say, or the scheduler of the reference."""
    from library.checkpoints.reading import read_metadata

    for place in filter(None, (source.name, reference)):
        path = Path(place)
        if not path.exists():
            continue
        found, _ = stated(path)
        if V_PRED in found:
            return True
        if path.is_dir() and (path / "scheduler" / "scheduler_config.json").is_file():
            return False
        kind = read_metadata(path).get("modelspec.prediction_type") if path.is_file() else None
        if kind is not None:
            return kind.startswith("v")
    return None if source.v2 else False


def _own_dtype(source: Source, part: str) -> torch.dtype:
    """The dtype that a part had in what was read."""
    import torch

    if not source.is_file:
        return source.part_dtypes.get({"te": "text_encoder"}.get(part, part), torch.float32)
    prefixes = {"unet": (UNET,), "vae": (VAE,), "te": ("cond_stage_model.",)}[part]
    found = (dtype for key, (dtype, _) in source.tensor_specs.items() if key.startswith(prefixes))
    dtype = next((dtype for dtype in found if dtype.is_floating_point), torch.float32)
    return torch.bfloat16 if dtype.itemsize == 1 else dtype
