"""The parts of a model, each from its own file, in one: tools/merge_sd3_safetensors.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from library.families.shared.reading import error_prefix
from library.model_tools.output import require_output, write_tensors
from library.model_tools.recipes import modelspec
from library.model_tools.relayout import relaid
from library.model_tools.weights import WeightFile, dtype_of, require_device
from library.options.base import Options
from library.options.logging import ConsoleOptions
from library.options.model_files import BundleOptions
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from library.checkpoints.keymap import Entry
    from library.model_tools.output import FileTensors

    Describe = Callable[[str, dict[str, tuple[int, ...]]], tuple[list[Entry], dict[str, Any]]]

GROUPS = (BundleOptions, ConsoleOptions)


def bundle(describe: Describe, prefixes: Mapping[str, str], opts: Options) -> None:
    """Writes --output with the parts whose files the options name.

    A part that --dit holds too is taken from the file of its own.

    Args:
        describe: from an option and the shapes of its file's tensors to what they are in the bundle, and its facts.
        prefixes: of the parts' names in the bundle by option, the denoiser's first.
    Raises: UserError: missing, broken, something else, or a result that cannot be written.
    """
    chosen = opts.bundle
    given = {option: name for option in prefixes if (name := getattr(chosen, option))}
    path = require_output("--output", chosen.output, given.values(), [".safetensors"])
    dtype = dtype_of(chosen.save_precision)
    device = require_device(chosen.device if dtype is not None else "cpu")
    tensors: FileTensors = {}
    facts: dict[str, Any] = {}
    for option, name in given.items():
        with error_prefix(f"--{option}"), error_prefix(name):
            file = WeightFile(name)
            entries, known = describe(option, {key: file.shape(key) for key in file.keys})
        facts |= known
        replaced = [key for key in tensors if key.startswith(prefixes[option])]
        if replaced:
            LOGGER.info("--%s: in place of %d tensors of %s", option, len(replaced), given[next(iter(given))])
        kept = {key: tensor for key, tensor in tensors.items() if key not in set(replaced)}
        tensors = {**kept, **relaid(file, entries, dtype, device)}
    for option, prefix in prefixes.items():
        if not any(key.startswith(prefix) for key in tensors):
            LOGGER.info("without %s: programs will ask for a file of its own", option)
    write_tensors(path, tensors, modelspec(path, facts, {}), desc="bundling")
