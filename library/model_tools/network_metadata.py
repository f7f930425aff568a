"""Metadata of network files that tools make from others: what they are, and what they were made from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from library import version
from library.checkpoints.hashes import file_hash
from library.checkpoints.metadata import minimal
from library.model_tools.block_weights import BlockWeights
from library.model_tools.network_io import DOWN, Source, scale_of
from library.runtime.logs import LOGGER
from networks.files import Entries

RECIPE = "ss_merge_recipe"
DYNAMIC = "Dynamic"  # in place of a number where layers differ
# What a file made from several has of theirs, where they agree.
_SHARED = (
    "ss_v2",
    "ss_base_model_version",
    "modelspec.sai_model_spec",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.prediction_type",
    "modelspec.resolution",
)
_BASE_MODEL = ("ss_v2", "ss_base_model_version")


def recipe(kind: str, inputs: Iterable[Mapping[str, Any]]) -> str:
    """What a file was made from, as JSON: ``{"type": kind, "models": [...]}``.

    Args: inputs: for each file its "path" and what else is to be noted, such as "ratio". Names are written without
        folders, with the sha256 of the whole file.
    """
    models = []
    for facts in inputs:
        path = Path(facts["path"])
        others = {name: value for name, value in facts.items() if name != "path" and value is not None}
        models.append({"name": path.name, "sha256": file_hash(path), **others})
    return json.dumps({"type": kind, "models": models})


def recipe_of_networks(
    kind: str, models: Sequence[str], ratios: Sequence[float], weights: Sequence[BlockWeights | None]
) -> str:
    """The `recipe` of a merge of network files."""
    return recipe(
        kind,
        (
            {"path": path, "ratio": ratio, "lbw": weight and weight.text}
            for path, ratio, weight in zip(models, ratios, weights, strict=True)
        ),
    )


def merged_metadata(
    sources: Sequence[Source], entries: Entries, made: str, title: str, *, no_metadata: bool
) -> dict[str, str]:
    """The metadata of a file made from several, without its hashes.

    Args:
        entries: what is in the new file.
        made: its `recipe`.
        title: its name.
        no_metadata: only type, base model, modelspec and hashes.
    """
    metadata = _shared([source.metadata for source in sources])
    metadata |= {"ss_network_module": "networks.lora", **rank_metadata(entries), RECIPE: made}
    metadata |= spec_of_merge(metadata, [(source.path, source.metadata) for source in sources], title)
    return minimal(metadata) if no_metadata else metadata


def spec_of_merge(
    metadata: Mapping[str, str], sources: Iterable[tuple[Path, Mapping[str, str]]], title: str
) -> dict[str, str]:
    """The modelspec.* keys that a merge has of its own; empty where its `metadata` does not say what it is."""
    if "modelspec.architecture" not in metadata:
        return {}
    names = [values.get("modelspec.title", path.stem) for path, values in sources]
    return {
        "modelspec.title": title,
        "modelspec.date": datetime.now().replace(microsecond=0).isoformat(),
        "modelspec.implementation_version": f"{version.NAME}/{version.VERSION}",
        "modelspec.merged_from": ", ".join(names),
    }


def rank_metadata(entries: Entries) -> dict[str, str]:
    """`ss_network_dim` and `ss_network_alpha` of LoRA layers; "Dynamic" where they differ. Larger kernels, whose rank
    is an option of its own, count only where there is nothing else."""
    layers = [entry for entry in entries.values() if DOWN in entry]
    plain = [entry for entry in layers if is_plain(entry[DOWN])] or layers
    ranks = {len(entry[DOWN]) for entry in plain}
    alphas = {round(scale_of(entry) * len(entry[DOWN]), 6) for entry in plain}
    if not plain:
        return {}
    return {
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else DYNAMIC,
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else DYNAMIC,
    }


def is_plain(down: Tensor) -> bool:
    """Whether a down matrix is one of a linear layer or of a 1x1 convolution."""
    return down.dim() == 2 or tuple(down.shape[2:]) == (1, 1)


def _shared(all_metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What the files say alike; files that say nothing agree with all. A base model that differs is warned about."""
    shared = {}
    for key in _SHARED:
        values = {metadata[key] for metadata in all_metadata if key in metadata}
        if len(values) == 1:
            shared[key] = values.pop()
        elif len(values) > 1 and key in _BASE_MODEL:
            LOGGER.warning("the files were made for different base models: %s %s", key, ", ".join(sorted(values)))
    return shared
