"""SDXL in a single file, as its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.errors import UserError
from library.families.sdxl.keymap import text1_map, text2_map
from library.families.sdxl.loading import text_encoders_of_file, unet_of_file
from library.families.sdxl.targets import text_targets, unet_targets
from library.families.sdxl.variants import ORIGINAL_CODE, file_problem, model_facts, projection_name
from library.families.shared.clip import public_name
from library.families.shared.file_model import FileModel, FilePart
from library.families.shared.markers import V_PRED
from library.families.shared.reading import Reader
from library.families.shared.unet import map_of_config, reads_masks

if TYPE_CHECKING:
    from library.families.shared.reading import Weights


def file_model(weights: Weights, encoder: str | None = None) -> FileModel:
    """The model in a file.

    Args:
        weights: its tensors, on torch's meta device, which must be the default device.
        encoder: always None: text encoders have no files of their own here.
    Raises: UserError: another kind of model, or an incomplete one.
    """
    problem = file_problem(weights)
    if problem:
        raise UserError(problem)
    reader = Reader(weights, None)
    encoders, unet = text_encoders_of_file(reader), unet_of_file(reader, inpainting=True)
    keys = {"te1": text1_map(), "te2": text2_map(projection_name(weights))}
    parts = [FilePart(te, encoders[te], keys[te], text_targets(encoders[te], te), public_name) for te in keys]
    parts.append(FilePart("denoiser", unet, map_of_config(unet.config), unet_targets(unet)))
    return FileModel(tuple(parts), model_facts(V_PRED in weights, inpaints=reads_masks(unet)), ORIGINAL_CODE)
