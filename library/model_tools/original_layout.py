"""Transformers of Diffusers models as single files in their authors' layout: tools/convert_diffusers_to_flux.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.families.shared.reading import error_prefix
from library.model_tools.output import require_output, write_tensors
from library.model_tools.recipes import modelspec
from library.model_tools.relayout import relaid
from library.model_tools.weights import WeightFile, dtype_of
from library.options.base import Options
from library.options.logging import ConsoleOptions
from library.options.model_files import ToOriginalOptions
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from library.checkpoints.keymap import Entry

    Describe = Callable[[dict[str, tuple[int, ...]]], tuple[list[Entry], dict[str, Any]]]

GROUPS = (ToOriginalOptions, ConsoleOptions)


def convert(describe: Describe, folder: str, opts: Options) -> None:
    """Writes the file --save_to from the transformer at --diffusers_path, one tensor at a time.

    Args:
        describe: from the shapes of the transformer's tensors to what the file holds, and its facts.
        folder: the transformer's own, inside a Diffusers folder.
    Raises: UserError: missing, incomplete, another model, or a result that cannot be written.
    """
    chosen = opts.original
    source = Path(chosen.diffusers_path)
    if (source / folder).is_dir():
        source = source / folder
    inputs = source.iterdir() if source.is_dir() else [source]
    path = require_output("--save_to", chosen.save_to, inputs, [".safetensors", ".sft"])
    if not source.exists():
        raise UserError(f"--diffusers_path: {source}: no such file or folder")
    file = WeightFile(source)
    with error_prefix(source):
        entries, facts = describe({key: file.shape(key) for key in file.keys})
    LOGGER.info("%s: %d tensors in Diffusers' layout, %s", source, len(file.keys), facts["modelspec.architecture"])
    tensors = relaid(file, entries, dtype_of(chosen.save_precision))
    write_tensors(path, tensors, modelspec(path, facts, {}), desc="converting")
