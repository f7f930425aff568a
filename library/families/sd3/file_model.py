"""Stable Diffusion 3/3.5 in single files, as its layers: with or without text encoders, and files of these."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.checkpoints.keymap import Each, KeyMap
from library.errors import UserError
from library.families.sd3.keymap import mmdit_map
from library.families.sd3.loading import denoiser_of_file, encoder_of_file
from library.families.sd3.targets import mmdit_targets
from library.families.sd3.variants import (
    FLAGS,
    ORIGINAL_CODE,
    encoder_prefix,
    encoder_problem,
    mmdit_prefix,
    model_facts,
    variant,
)
from library.families.shared.clip import public_name
from library.families.shared.file_model import FileModel, FilePart
from library.families.shared.reading import Reader
from library.families.shared.t5 import t5_targets
from library.families.shared.targets import clip_targets
from library.families.shared.unet import SAME

if TYPE_CHECKING:
    from library.families.shared.reading import Weights


def file_model(weights: Weights, encoder: str | None = None) -> FileModel:
    """The denoiser in a file, and the text encoders that lie beside it.

    Args:
        weights: the file's tensors, on torch's meta device, which must be the default device.
        encoder: for the file of a text encoder: which, "te1", "te2" or "te3".
    Raises: UserError: another kind of model, or an incomplete one.
    """
    if encoder is not None:
        problem = encoder_problem(weights.shapes, encoder)
        if problem:
            raise UserError(problem)
        part = _encoder(weights, encoder, encoder_prefix(weights, encoder) or "")
        return FileModel((part,), {}, ORIGINAL_CODE)
    denoiser, shape = denoiser_of_file(Reader(weights, None))
    found = {part: encoder_prefix(weights, part, inside=True) for part in FLAGS}
    parts = [_encoder(weights, part, prefix) for part, prefix in found.items() if prefix is not None]
    keys = mmdit_map(shape.depth, mmdit_prefix(weights))
    parts.append(FilePart("denoiser", denoiser, keys, mmdit_targets(denoiser)))
    kind = variant(dual=bool(shape.dual), qk_norm=shape.qk_norm)
    return FileModel(tuple(parts), model_facts(kind), ORIGINAL_CODE)


def _encoder(weights: Weights, part: str, prefix: str) -> FilePart:
    model = encoder_of_file(Reader(weights, None), part, prefix)
    keys = KeyMap(Each(prefix, "", *SAME))
    if part == "te3":
        return FilePart(part, model, keys, t5_targets(model))
    return FilePart(part, model, keys, clip_targets(model, part), public_name)
