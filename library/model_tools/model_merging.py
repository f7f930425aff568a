"""Weighted sums of whole models, tensor by tensor: tools/merge_models.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from library.checkpoints.keymap import first_few
from library.checkpoints.writing import Deferred
from library.errors import UserError
from library.families.shared.denoisers import denoiser_keys
from library.families.shared.recognition import NETWORK
from library.families.shared.unet import CHANNELS, INPAINTING_CHANNELS, UNET
from library.model_tools.output import require_output, write_tensors
from library.model_tools.recipes import merged_metadata
from library.model_tools.weights import WeightFile, dtype_of, require_device
from library.options.base import Options
from library.options.logging import ConsoleOptions
from library.options.model_files import MergeModelsOptions
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FIRST_CONVOLUTION = f"{UNET}input_blocks.0.0.weight"  # which has more inputs in models for inpainting
_GIVE = "give models of one kind"

GROUPS = (MergeModelsOptions, ConsoleOptions)


def merge_models(opts: Options) -> None:
    """Writes the sum of --models, each times its ratio.

    The file holds the tensors of the first model. Where a later one lacks a tensor, the first one's takes its share; so
    do the inputs for a mask of a model for inpainting beside models without.

    Raises: UserError: files that cannot be read or do not fit together, or a result that cannot be written.
    """
    chosen = opts.merge
    path = require_output("--output", chosen.output, chosen.models, [".safetensors"])
    models = [WeightFile(name) for name in chosen.models]
    require_same_kind(models)
    ratios = chosen.ratios or [1 / len(models)] * len(models)
    if abs(sum(ratios) - 1) > 1e-6:
        LOGGER.warning("--ratios: they sum to %g; other sums than 1 make weights larger or smaller", sum(ratios))
    summed = denoiser_keys(models[0].keys) if chosen.unet_only else set(models[0].keys)
    report_differences(models, summed, named=chosen.show_skipped)
    device, work, saved = require_device(chosen.device), dtype_of(chosen.precision), dtype_of(chosen.saving_precision)
    plan = Plan(models, ratios, summed, device, work)
    tensors = {}
    for key in models[0].keys:
        stored = models[0].dtype(key)
        dtype = saved if stored.is_floating_point else stored
        tensors[key] = Deferred(dtype, models[0].shape(key), partial(plan.tensor, key, dtype))
    recipe = {
        "precision": chosen.precision,
        "saving_precision": chosen.saving_precision,
        "unet_only": chosen.unet_only,
    }
    metadata = models[0].metadata if len(models) == 1 else merged_metadata(path, models, ratios, recipe)
    write_tensors(path, tensors, metadata, desc="merging")


@dataclass(frozen=True)
class Plan:
    """What is summed, where and how."""

    models: Sequence[WeightFile]
    ratios: Sequence[float]
    summed: set[str]  # tensors that are; the others are the first model's
    device: torch.device
    dtype: torch.dtype

    def tensor(self, key: str, dtype: torch.dtype) -> Tensor:
        """The sum of the models' tensors of that name, in `dtype`; whole numbers are the first model's."""
        first, *others = self.models
        if key not in self.summed or not dtype.is_floating_point:
            return first.read(key, dtype)
        having = [(model, ratio) for model, ratio in zip(others, self.ratios[1:], strict=True) if key in model.weights]
        lacking = sum(self.ratios[1:]) - sum(ratio for _, ratio in having) if len(having) < len(others) else 0.0
        total = first.read(key, self.dtype, self.device) * (self.ratios[0] + lacking)
        for model, ratio in having:
            own = model.read(key, self.dtype, self.device)
            if key == FIRST_CONVOLUTION:
                own = with_inputs_of(first.read(key, self.dtype, self.device), own)
            total += own.reshape(total.shape) * ratio
        return total.to(dtype)


def with_inputs_of(wide: Tensor, own: Tensor) -> Tensor:
    """A convolution's weight (out, in, h, w), with the further inputs that `wide` has."""
    import torch

    return torch.cat([own, wide[:, own.shape[1] :]], 1)


def require_same_kind(models: Sequence[WeightFile]) -> None:
    """Raises: UserError: files of other kinds, or tensors of other shapes, than the first one's. By headers alone."""
    first = models[0]
    for model in models:
        if model.kind == NETWORK:
            raise UserError(f"{model.path}: this is {model.kind}; networks/merge_lora.py merges those")
        if model.kind != first.kind:
            raise UserError(f"{model.path}: this is {model.kind}, and {first.path} is {first.kind}; {_GIVE}")
        shared = [key for key in first.keys if key in model.weights]
        if not shared:
            raise UserError(f"{model.path}: shares no tensor's name with {first.path}; {_GIVE}")
        for key in shared:
            ours, theirs = first.shape(key), model.shape(key)
            if key == FIRST_CONVOLUTION and theirs[1:2] != ours[1:2] and theirs[2:] == ours[2:]:
                if (ours[1], theirs[1]) == (INPAINTING_CHANNELS, CHANNELS):
                    continue
                if (ours[1], theirs[1]) == (CHANNELS, INPAINTING_CHANNELS):
                    raise UserError(
                        f"{model.path}: this is a model for inpainting, and {first.path} is none; give it as the first "
                        "one, whose tensors the result has"
                    )
            if prod(ours) != prod(theirs) or ours[:2] != theirs[:2]:  # 1x1 convolutions may be stored flat
                raise UserError(f"{model.path}: {key} has shape {theirs}, in {first.path} {ours}; {_GIVE}")


def report_differences(models: Sequence[WeightFile], summed: set[str], *, named: bool) -> None:
    """Says how many tensors a later model lacks or has alone; `named`: and which."""
    first = models[0]
    for model in models[1:]:
        own = set(model.keys)
        lacking = [key for key in first.keys if key in summed and key not in own]
        extra = [key for key in model.keys if key not in first.weights]
        for keys, what in (
            (lacking, "are not in it; the first model's take their share"),
            (extra, "are not in the first model, and so not in the result"),
        ):
            if keys:
                names = ", ".join(keys) if named else first_few(keys, 3)
                LOGGER.warning("%s: %d tensors %s: %s", model.path, len(keys), what, names)
