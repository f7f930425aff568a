"""Metadata of network files that tools make from others: what they are, and what they were made from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from library.checkpoints.metadata import minimal
from library.model_tools.block_weights import BlockWeights
from library.model_tools.network_io import Source, scale_of
from library.model_tools.recipes import file_hashes, modelspec
from library.runtime.logs import LOGGER
from networks.files import Entries
from networks.layers.locon import DOWN

RECIPE = "ss_merge_recipe"
DYNAMIC = "Dynamic"  # in place of a number where layers differ
# What a file made from several has of theirs, where they agree.
_SHARED = (
    "ss_v2",
    "ss_base_model_version",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.prediction_type",
    "modelspec.resolution",
)
_BASE_MODEL = ("ss_v2", "ss_base_model_version")


def recipe(kind: str, models: Sequence[str], ratios: Sequence[float], weights: Sequence[BlockWeights | None]) -> str:
    """What a file was merged from, as JSON: ``{"type": kind, "models": [...]}``.

    Each model has its "name" without folders, the "sha256" of its file, "ratio", and "lbw" where it had block weights.
    """
    inputs = []
    for path, sha256, ratio, weight in zip(models, file_hashes(list(map(Path, models))), ratios, weights, strict=True):
        inputs.append({"name": Path(path).name, "sha256": sha256, "ratio": ratio})
        if weight is not None:
            inputs[-1]["lbw"] = weight.text
    return json.dumps({"type": kind, "models": inputs})


def merged_metadata(
    sources: Sequence[Source], entries: Entries, made: str, path: str | Path, *, no_metadata: bool
) -> dict[str, str]:
    """The metadata of a file made from several, without its hashes.

    Args:
        entries: what is in the new file.
        made: its `recipe`.
        path: the new file.
        no_metadata: only type, base model, modelspec and hashes.
    """
    shared = {}  # what the files say alike; files that say nothing agree with all
    for key in _SHARED:
        values = {source.metadata[key] for source in sources if key in source.metadata}
        if len(values) == 1:
            shared[key] = values.pop()
        elif len(values) > 1 and key in _BASE_MODEL:
            LOGGER.warning("the files were made for different base models: %s %s", key, ", ".join(sorted(values)))
    titles = ", ".join(source.metadata.get("modelspec.title") or source.path.stem for source in sources)
    metadata = {key: value for key, value in shared.items() if key.startswith("ss_")}
    metadata |= {"ss_network_module": "networks.lora", **rank_metadata(entries), RECIPE: made}
    metadata |= modelspec(Path(path), shared, {"merged_from": titles})
    return minimal(metadata) if no_metadata else metadata


def rank_metadata(entries: Entries) -> dict[str, str]:
    """`ss_network_dim` and `ss_network_alpha` of LoRA layers; "Dynamic" where they differ.

    Larger kernels, whose rank is an option of its own, count only where there is nothing else.
    """
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
