"""Merging networks into the weights of models: the merge_lora scripts of all families.

A model streams from its file to the new one, tensor by tensor. Without a model, the networks become one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library import version
from library.checkpoints.writing import materialise, write_torch
from library.errors import UserError
from library.families.shared.reading import counters
from library.model_tools.block_weights import BlockWeights, parse_all
from library.model_tools.model_layers import Edit, ModelFile, open_given
from library.model_tools.network_io import Source, named, read_network
from library.model_tools.network_merging import merge_networks
from library.model_tools.output import require_output, require_room, write_tensors
from library.model_tools.recipes import file_hashes, modelspec, of_whole_model
from library.model_tools.weights import dtype_of, require_device
from library.options.base import Options
from library.options.model_tools import WEIGHT_ENDINGS, MergeOptions
from library.runtime.files import reason
from library.runtime.logs import LOGGER
from networks.build import change_of
from networks.file_names import require_places
from networks.files import NetworkFile, names_in_files
from networks.fused import ROWS
from networks.inputs import with_all_inputs
from networks.registry import type_of

if TYPE_CHECKING:
    from library.checkpoints.writing import Deferred
    from library.types import LoraTarget

_FACTS = ("alpha", "on_input", ROWS)  # tensors of an entry that say how the others are used


@dataclass(frozen=True)
class Network:
    """A network to merge."""

    source: Source
    ratio: float
    weights: BlockWeights | None

    def factor(self, layer: str) -> float:
        return self.ratio * (self.weights.factor(layer) if self.weights else 1.0)


@dataclass(frozen=True)
class Share:
    """What a network gives to a layer."""

    entry: Mapping[str, Tensor]
    factor: float

    def change(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """`change_of` the entry at its factor, on the device of `weight`."""
        entry = {
            name: value if name.rpartition("/")[2] in _FACTS else value.to(weight.device)
            for name, value in self.entry.items()
        }
        return change_of(entry, weight.shape, lambda: weight, self.factor)

    def bias(self) -> Tensor | None:
        """What the entry adds to the bias, at a factor of 1."""
        kind = type_of(self.entry)
        return None if kind is None else kind.layer.load().bias_change(self.entry)


def merge(opts: Options) -> None:
    """Merges --models into the models that are given, or into one network.

    Raises: UserError: files that cannot be read or do not fit, or a result that cannot be written.
    """
    own: MergeOptions = opts.merge
    paths, models = own.models or [], own.rewritten()
    ratios = own.ratios or [1.0] * len(paths)
    weights = parse_all(own.lbws, len(paths))
    if not models:
        merge_networks(
            paths,
            ratios,
            str(own.save_to),
            weights=weights,
            concat=own.concat,
            shuffle=own.shuffle,
            legacy_ratio=own.legacy_ratio,
            precision=own.precision,
            save_precision=own.save_precision,
            no_metadata=own.no_metadata,
        )
        return
    inputs = [*paths, *(model.path for model in models)]
    for model in models:
        require_output(f"--{model.save_option}", model.save_to, inputs, WEIGHT_ENDINGS)
    device, precision = require_device(own.device_name), dtype_of(own.precision)
    files = [open_given(model.option, model.path, own.FAMILIES, encoder=model.encoder) for model in models]
    networks = [Network(*each) for each in zip(map(read_network, paths), ratios, weights, strict=True)]
    shares = shares_by_layer(files, networks, all_encoders=len(models) == len(own.MODELS))
    for model, file in zip(models, files, strict=True):
        edits = edits_of(file, shares, device, precision)
        LOGGER.info("%s: %d layers change", model.path, len({key for key, _ in edits}))
        metadata = {} if own.no_metadata else _metadata(Path(model.save_to), file, networks)
        _write(Path(model.save_to), file, file.with_edits(edits, dtype_of(own.save_precision)), metadata)


# ---- which layer changes by what


def shares_by_layer(
    files: Sequence[ModelFile], networks: Sequence[Network], *, all_encoders: bool = True
) -> dict[str, list[Share]]:
    """What the networks give to each layer, by the layers' keys, in the networks' order. Sizes are checked.

    Args: all_encoders: no text encoder is in a file that is not given.
    Raises: UserError: a network of which nothing fits, or nothing of a part that is given, or a layer of another size.
    """
    places = {target.key: (file, target) for file in files for target in file.targets}
    targets = [target for _, target in places.values()]
    known = names_in_files(targets)
    given = ("_unet_",) if any("denoiser" in file.parts for file in files) else ()
    given += ("_te",) if all_encoders else ()
    shares: dict[str, list[Share]] = {}
    sources = [NetworkFile(network.source.path, network.source.entries) for network in networks]
    for file in files:
        sources = with_all_inputs(sources, file.targets, file.models)
    for network, source in zip(networks, sources, strict=True):
        path, entries = source.path, source.entries
        _report_unused(path, entries, known, given)
        matching = source.matching(targets, lambda target: places[target.key][0].rows(target))
        if network.weights:
            network.weights.check(matching)
        for key, entry in matching.items():
            share = Share(entry, network.factor(key))
            file, target = places[key]
            with named(f"{path}: {key}"):  # on the meta device nothing is computed
                _, bias = share.change(torch.empty(file.shape(target), device="meta"))
                if bias is not None and not file.has(target, "bias"):
                    raise UserError("changes a bias, and the model has none there")
            if share.factor:
                shares.setdefault(key, []).append(share)
    return shares


def _report_unused(path: Path, layers: Iterable[str], known: set[str], given: Sequence[str]) -> None:
    """Warns of layers without a place.

    Args:
        known: names that layers may have.
        given: what names of layers hold whose parts are all there.
    Raises: UserError: a whole part has no place, though it is there.
    """
    layers = list(layers)
    unused = [layer for layer in layers if layer not in known]
    if not unused or len(unused) == len(layers):  # of a network of which nothing fits, `matching` says more
        return
    elsewhere = {layer for layer in unused if not any(word in layer for word in given)}
    require_places(path, (layer for layer in layers if layer not in elsewhere), known)
    hint = "; to merge them, too, give the model's other files" if elsewhere else ""
    what = "%s: %d of its %d layers have no place in what is given, the first is %s%s"
    LOGGER.warning(what, path, len(unused), len(layers), unused[0], hint)


def edits_of(
    file: ModelFile, shares: Mapping[str, Sequence[Share]], device: torch.device, precision: torch.dtype
) -> dict[tuple[str, str], Edit]:
    """What becomes of the tensors of a file's layers.

    Args:
        device: to compute on.
        precision: dtype in which changes are added to weights.
    """
    edits: dict[tuple[str, str], Edit] = {}
    for target in file.targets:
        own = shares.get(target.key)
        if not own:
            continue
        edits[target.key, "weight"] = partial(_merged, file, target, own, device, precision)
        biased = [share for share in own if share.bias() is not None]
        if biased:
            edits[target.key, "bias"] = partial(_merged_bias, file, target, biased, precision)
    return edits


def _merged(
    file: ModelFile, target: LoraTarget, shares: Sequence[Share], device: torch.device, precision: torch.dtype
) -> Tensor:
    """A layer's weight with the changes of the networks, one after the other, float32."""
    weight = file.weight(target).to(device)
    for share in shares:
        change, _ = share.change(weight)
        weight = _added(weight, change.reshape(weight.shape), precision)
    return weight.cpu()


def _merged_bias(file: ModelFile, target: LoraTarget, shares: Sequence[Share], precision: torch.dtype) -> Tensor:
    bias = file.weight(target, "bias")
    for share in shares:
        bias = _added(bias, share.bias() * share.factor, precision)
    return bias


def _added(weight: Tensor, change: Tensor, precision: torch.dtype) -> Tensor:
    if precision == torch.float32:
        return weight.add_(change)
    return (weight.to(precision) + change.to(precision)).float()


# ---- what is written


def _metadata(path: Path, file: ModelFile, networks: Sequence[Network]) -> dict[str, str]:
    """modelspec, and what the model was made from under the name that web UIs read."""
    model_hash, *hashes = file_hashes([file.path, *(network.source.path for network in networks)])
    own: Mapping[str, str] = getattr(file.weights, "metadata", {})
    merged = [
        {"name": each.source.path.name, "sha256": sha256, "ratio": each.ratio}
        | ({"lbw": each.weights.text} if each.weights else {})
        for each, sha256 in zip(networks, hashes, strict=True)
    ]
    model = {"name": file.path.name, "sha256": model_hash}
    made = json.dumps({"type": version.NAME, "model": model, "networks": merged})
    metadata = {"sd_merge_recipe": made} | {key: own[key] for key in ("format",) if key in own}
    if not file.model.facts:  # the file of a text encoder: modelspec has no word for it
        return metadata
    known = {key: str(value) for key, value in of_whole_model(file.model.facts).items() if key.startswith("modelspec.")}
    known |= {"modelspec.implementation": file.model.original_code, **own}
    titles = [own.get("modelspec.title", file.path.stem)]
    titles += [each.source.metadata.get("modelspec.title", each.source.path.stem) for each in networks]
    return {**modelspec(path, known, {"merged_from": ", ".join(titles)}), **metadata}


def _write(path: Path, file: ModelFile, tensors: Mapping[str, Tensor | Deferred], metadata: Mapping[str, str]) -> None:
    """Raises: UserError: no room, the disk refuses it, or values that the dtype cannot hold."""
    if path.suffix.lower() == ".safetensors":
        write_tensors(path, tensors, metadata, desc="merging")
        return
    require_room(path, sum(value.dtype.itemsize * torch.Size(value.shape).numel() for value in tensors.values()))
    state = {key: materialise(value) for key, value in tensors.items()}  # torch's format wants them all at once
    try:
        write_torch(path, {"state_dict": state, **counters(file.weights)})
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({reason(error)}); an earlier file is as it was") from None
    LOGGER.info("wrote %s: %d tensors", path, len(tensors))
