"""The parts of a Stable Diffusion 3 model, each from a file of its own, under the names of a single file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from library.checkpoints.keymap import Entry, Rename, first_few
from library.errors import UserError
from library.families.sd3.keymap import ENCODERS, MMDIT, mmdit_map
from library.families.sd3.loading import CHANNELS
from library.families.sd3.spec import SD3
from library.families.sd3.variants import (
    FLAGS,
    ORIGINAL_CODE,
    encoder_prefix,
    encoder_problem,
    mmdit_prefix,
    mmdit_shape,
    model_facts,
    variant,
)
from library.families.shared.recognition import recognise, vae_kind_problem
from library.families.shared.vae import NO_VAE, VAE, VAE_PARTS, file_entries

Shapes = Mapping[str, tuple[int, ...]]

# Before the names of each part in the bundle, by the option that gives its file.
PREFIXES = {"dit": MMDIT, "vae": VAE, **{option: ENCODERS[part] for part, option in FLAGS.items()}}
_PARTS = {option: part for part, option in FLAGS.items()}
_ALONE = Rename("{rest}", "{rest}")  # the tensor is the same


def bundle_entries(option: str, shapes: Shapes) -> tuple[list[Entry], dict[str, Any]]:
    """What a file gives to the bundle, names there and names in the file; and modelspec.* values of the whole.

    Args:
        option: that of `PREFIXES` which gives the file. The denoiser's file gives all that it holds, other parts too.
        shapes: of the file's tensors.
    Raises: UserError: the file is something else, or incomplete.
    """
    if option == "dit":
        return _denoiser_entries(shapes)
    if option == "vae":
        return _vae_entries(shapes), {}
    part = _PARTS[option]
    problem = encoder_problem(shapes, part)
    if problem:
        raise UserError(problem)
    inside = encoder_prefix(shapes, part) or ""
    return _moved((key for key in shapes if key.startswith(inside)), inside, ENCODERS[part]), {}


def _denoiser_entries(shapes: Shapes) -> tuple[list[Entry], dict[str, Any]]:
    kind = recognise(shapes)
    if kind != SD3:
        raise UserError(f"this is {kind}; the denoiser of a Stable Diffusion 3 model is needed here")
    prefix = mmdit_prefix(shapes)
    others = [key for key in shapes if key.startswith((VAE, *ENCODERS.values())) or not key.startswith(prefix)]
    own = [key for key in shapes if key not in set(others)]
    shape = mmdit_shape(shapes, prefix)
    keys = mmdit_map(shape.depth, prefix)
    unknown = [key for key in own if keys.by_file(key) is None]
    if unknown:
        raise UserError(f"{len(unknown)} tensors have unknown names: {first_few(unknown)}")
    facts = model_facts(variant(dual=bool(shape.dual), qk_norm=shape.qk_norm))
    return _moved(own, prefix, MMDIT) + _moved(others, "", ""), {**facts, "modelspec.implementation": ORIGINAL_CODE}


def _vae_entries(shapes: Shapes) -> list[Entry]:
    problem = vae_kind_problem(recognise(shapes), (SD3,))
    if problem:
        raise UserError(problem)
    prefix = VAE if any(key.startswith(VAE) for key in shapes) else ""
    inside = [key for key in shapes if key.startswith(tuple(prefix + part for part in VAE_PARTS))]
    if not inside:
        raise UserError(NO_VAE)
    channels = next((shapes[key][1] for key in inside if key.endswith("decoder.conv_in.weight")), None)
    if channels != CHANNELS:
        raise UserError(f"its latents have {channels} channels; the VAE of a Stable Diffusion 3 model has {CHANNELS}")
    entries = file_entries([key.removeprefix(prefix) for key in inside])
    return [Entry(entry.file, tuple(prefix + name for name in entry.models), entry.rule) for entry in entries]


def _moved(keys: Iterable[str], old: str, new: str) -> list[Entry]:
    return [Entry(new + key.removeprefix(old), (key,), _ALONE) for key in keys]
