"""Writing whole models: tensors that are converted when they are written, and the parts of Diffusers folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.keymap import Entry, KeyMap
from library.checkpoints.reading import open_weights
from library.checkpoints.writing import Deferred, materialise, write_safetensors, write_torch
from library.errors import UserError
from library.families.shared.clip import public_state
from library.families.shared.recognition import read_json
from library.runtime.durable import replacing_folder
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.families.shared.reading import Source, TensorSpec

    FileTensors = dict[str, Tensor | Deferred]

FORMATS = ("ckpt", "safetensors", "diffusers", "diffusers_safetensors")


def write_model(
    path: Path,
    source: Source,
    *,
    save_as: str,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    tensors: Callable[[], FileTensors],
    fill: Callable[[Path, bool], None],
    copied: Iterable[str] | None = None,
) -> None:
    """Writes a whole model as a single file or a Diffusers folder; an earlier `path` survives a failure.

    Args:
        source: where the model came from: its `name`, its `counters`, and `preserved`, the keys that it does not use.
        save_as: one of `FORMATS`.
        dtype: what --save_precision says; a Diffusers folder has the formats of the models in memory all the same.
        metadata: goes into a .safetensors file; a .ckpt has only its `ss_epoch` and `ss_steps`,
            added to the counters of the source.
        tensors: what the models hold, under a single file's names.
        fill: writes all parts into a new folder; its second argument: .safetensors weights, else .bin.
        copied: keys of the source file that a single file has as they are, where `tensors` has them not; `preserved`
            if not given.
    Raises: UserError: an unknown format. OSError: it cannot be written.
    """
    if save_as not in FORMATS:
        raise UserError(f"--save_model_as {save_as}: choose one of {', '.join(FORMATS)}")
    if save_as.startswith("diffusers"):
        if dtype is not None:
            LOGGER.info("--save_precision acts on single files only; the Diffusers folder keeps the models' precision")
        with replacing_folder(path) as folder:
            fill(folder, save_as == "diffusers_safetensors")
        return
    found = tensors()
    found |= _preserved(source.name, source.preserved if copied is None else copied, found)
    if save_as == "safetensors":
        write_safetensors(path, found, metadata)
        return
    done = {"epoch": int(metadata.get("ss_epoch", 0)), "global_step": int(metadata.get("ss_steps", 0))}
    done = {name: value + source.counters.get(name, 0) for name, value in done.items()}
    write_torch(path, {"state_dict": {key: materialise(value) for key, value in found.items()}, **done})


# --- single files -----------------------------------------------------------------------------------------------------


def deferred_part(
    keys: KeyMap,
    state: Mapping[str, Tensor],
    *,
    tensor_specs: Mapping[str, TensorSpec],
    folder_dtype: torch.dtype | None,
    dtype: torch.dtype | None,
) -> FileTensors:
    """One part of a model under a file's names; each tensor is converted when it is written.

    Args:
        keys: file names against those of `state`.
        state: the part's tensors under the model's names.
        tensor_specs: dtype and shape that tensors had in the source file, by file name; shapes that differ only in
            axes of 1 are restored.
        folder_dtype: of the part in a source that was a folder.
        dtype: of every tensor; None: as in the source, else as in memory. What training changed in weights of 8 bits
            would be lost in them again: where they no longer hold the values exactly, it is bfloat16.
    Raises: KeyMapError: a tensor has no name in the file.
    """
    return {entry.file: _deferred(entry, state, tensor_specs, folder_dtype, dtype) for entry in keys.entries(state)}


def _deferred(
    entry: Entry,
    state: Mapping[str, Tensor],
    tensor_specs: Mapping[str, TensorSpec],
    folder_dtype: torch.dtype | None,
    dtype: torch.dtype | None,
) -> Deferred:
    import torch

    live = [state[name].detach() for name in entry.models]
    shape = tuple(entry.rule.join([tensor.to("meta") for tensor in live]).shape)
    old_dtype, old_shape = tensor_specs.get(entry.file, (folder_dtype or live[0].dtype, shape))
    if prod(old_shape) == prod(shape):
        shape = old_shape  # 1x1 convolutions may be stored flat or not; keep the file's way
    kept = dtype or old_dtype
    if dtype is None and old_dtype.is_floating_point and old_dtype.itemsize == 1:
        holds_all = all(tensor.to(old_dtype).to(tensor.dtype).equal(tensor) for tensor in live)
        kept = old_dtype if holds_all else torch.bfloat16

    def make() -> Tensor:
        return entry.rule.join([tensor.cpu() for tensor in live]).reshape(shape).to(kept)

    return Deferred(kept, shape, make)


def _preserved(name: str, keys: Iterable[str], written: Mapping[str, Any]) -> FileTensors:
    """Tensors of a source file that its model does not use, exactly as they are.

    Args:
        name: the file. Where it is gone or broken, there are none, and a warning.
        keys: of these tensors.
        written: what is saved anyway.
    """
    keys = [key for key in keys if key not in written]
    if not keys:
        return {}
    try:
        weights = open_weights(name)
    except UserError as error:
        LOGGER.warning(f"saving without the {len(keys)} tensors that training does not use: {error}")
        return {}
    tensors: FileTensors = {}
    for key in keys:
        if key in weights:
            tensors[key] = Deferred(weights.dtype(key), weights.shapes[key], lambda key=key: weights[key])
    return tensors


# --- Diffusers folders ------------------------------------------------------------------------------------------------


def save_clip(text_encoder: nn.Module, folder: Path, *, safe: bool) -> None:
    """Writes a CLIP text encoder by hand: transformers 5 leaves `text_model.` out, without which nothing older reads.

    Args:
        safe: a .safetensors file, else a .bin.
    """
    folder.mkdir()
    text_encoder.config.architectures = [type(text_encoder).__name__]
    text_encoder.config.to_json_file(folder / "config.json")
    state = {name: materialise(tensor) for name, tensor in public_state(text_encoder).items()}
    if safe:
        write_safetensors(folder / "model.safetensors", state, {"format": "pt"})
    else:
        write_torch(folder / "pytorch_model.bin", state)


def save_scheduler(source: str, folder: Path, make: Callable[[], Any]) -> str:
    """Copies the scheduler of a source folder, or writes the one that `make` gives. Returns: its class's name."""
    own = Path(source) / "scheduler" / "scheduler_config.json"
    if own.is_file():
        folder.mkdir()
        shutil.copyfile(own, folder / own.name)
    else:
        make().save_pretrained(folder)
    return str(read_json(folder / own.name).get("_class_name"))


def write_model_index(folder: Path, pipeline: str, parts: Mapping[str, Any]) -> None:
    """Writes model_index.json, by which diffusers knows the pipeline.

    Args:
        pipeline: the class's name.
        parts: part -> ("diffusers" or "transformers", class name), None where it has none; other values as they are.
    """
    import diffusers

    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    for name, value in sorted(parts.items()):
        index[name] = [None, None] if value is None else list(value) if isinstance(value, tuple) else value
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
