"""FLUX.1 with diffusers' names, as the file that its authors' code reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from library.checkpoints.keymap import Entry, require_same_keys
from library.errors import UserError
from library.families.flux.keymap import flux_map
from library.families.flux.spec import FLUX, SPEC
from library.families.flux.variants import flux_shape, model_facts, variant
from library.families.shared.building import meta_model
from library.families.shared.recognition import recognise

DENOISER_FOLDER = SPEC.folders["denoiser"]


def original_entries(shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[Entry], dict[str, Any]]:
    """What the original file holds, and what its metadata says of such a model.

    Args: shapes: of the transformer's tensors, under diffusers' names.
    Raises: UserError: another model, another layout, or tensors that are missing or too many.
    """
    from diffusers import FluxTransformer2DModel

    kind = recognise(shapes)
    if kind != FLUX:
        raise UserError(f"this is {kind}; the transformer of a FLUX.1 model in Diffusers' layout is needed here")
    shape = flux_shape(shapes)
    if not shape.diffusers:
        raise UserError("has the original names already, which are those that this script writes")
    wanted = meta_model(partial(FluxTransformer2DModel, **shape.diffusers_config())).state_dict()
    require_same_keys((key.removeprefix(shape.prefix) for key in shapes), wanted, "the transformer")
    entries = flux_map().entries(wanted)
    entries = [replace(entry, models=tuple(shape.prefix + name for name in entry.models)) for entry in entries]
    return entries, model_facts(variant(shape.guidance))
