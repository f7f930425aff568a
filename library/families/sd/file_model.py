"""Stable Diffusion 1.x/2.x in a single file, as its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.errors import UserError
from library.families.sd.keymap import text_map
from library.families.sd.loading import text_encoder_of_file, unet_of_file
from library.families.sd.spec import SD1, SD2
from library.families.sd.targets import text_targets, unet_targets
from library.families.sd.variants import ORIGINAL_CODE, has_text_model_level, mismatch, model_facts
from library.families.shared.clip import public_name
from library.families.shared.file_model import FileModel, FilePart
from library.families.shared.markers import V_PRED
from library.families.shared.reading import Reader
from library.families.shared.recognition import recognise
from library.families.shared.unet import map_of_config, reads_masks

if TYPE_CHECKING:
    from library.families.shared.reading import Weights


def file_model(weights: Weights, encoder: str | None = None) -> FileModel:
    """The model in a file. 2.x counts as the version for 768 pixels, which predicts v.

    Args:
        weights: its tensors, on torch's meta device, which must be the default device.
        encoder: always None: text encoders have no files of their own here.
    Raises: UserError: another kind of model, or an incomplete one.
    """
    kind = recognise(weights)
    if kind not in (SD1, SD2):
        raise UserError(str(mismatch(kind, v2=False)))
    v2 = kind == SD2
    level = v2 or has_text_model_level(weights)
    reader = Reader(weights, None)
    text_encoder, unet = text_encoder_of_file(reader, v2, level), unet_of_file(reader, v2, inpainting=True)
    parts = (
        FilePart("te", text_encoder, text_map(v2, level), text_targets(text_encoder), public_name),
        FilePart("denoiser", unet, map_of_config(unet.config), unet_targets(unet)),
    )
    facts = model_facts(v2, v_prediction=v2 or V_PRED in weights, inpaints=reads_masks(unet))
    return FileModel(parts, facts, ORIGINAL_CODE)
