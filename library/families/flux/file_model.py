"""FLUX.1 in single files, as its layers: the transformer's, bundles, and files of text encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.checkpoints.keymap import Each, KeyMap
from library.errors import UserError
from library.families.flux.keymap import flux_map
from library.families.flux.loading import encoder_of_file, transformer_of_file
from library.families.flux.targets import transformer_targets
from library.families.flux.variants import FLAGS, ORIGINAL_CODE, encoder_prefix, encoder_problem, model_facts, variant
from library.families.shared.clip import LEVEL, public_name
from library.families.shared.file_model import FileModel, FilePart
from library.families.shared.reading import Reader
from library.families.shared.t5 import t5_targets
from library.families.shared.targets import clip_targets
from library.families.shared.unet import SAME

if TYPE_CHECKING:
    from library.families.shared.reading import Weights


def file_model(weights: Weights, encoder: str | None = None) -> FileModel:
    """The transformer in a file, and the text encoders that lie beside it.

    Args:
        weights: the file's tensors, on torch's meta device, which must be the default device.
        encoder: for the file of a text encoder: which, "te1" or "te3".
    Raises: UserError: another kind of model, or an incomplete one.
    """
    if encoder is not None:
        prefix = encoder_prefix(weights, encoder)
        if prefix is None:
            raise UserError(str(encoder_problem(weights, encoder)))
        return FileModel((_encoder(weights, encoder, prefix),), {}, ORIGINAL_CODE)
    denoiser, shape = transformer_of_file(Reader(weights, None))
    found = {part: encoder_prefix(weights, part, inside=True) for part in FLAGS}
    parts = [_encoder(weights, part, prefix) for part, prefix in found.items() if prefix is not None]
    keys = flux_map(shape.prefix, diffusers=shape.diffusers)
    parts.append(FilePart("denoiser", denoiser, keys, transformer_targets(denoiser)))
    return FileModel(tuple(parts), model_facts(variant(shape.guidance)), ORIGINAL_CODE)


def _encoder(weights: Weights, part: str, prefix: str) -> FilePart:
    model = encoder_of_file(weights, part, prefix)
    if part == "te3":
        return FilePart(part, model, KeyMap(Each(prefix, "", *SAME)), t5_targets(model))
    level = any(key.startswith(prefix + LEVEL) for key in weights)  # some files leave it out
    keys = KeyMap(Each(prefix, "" if level else LEVEL, *SAME))
    return FilePart(part, model, keys, clip_targets(model, part), public_name)
