"""What the metadata of a derived model says: how it was made, from what, and what it is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library import version
from library.checkpoints import hashes
from library.checkpoints.writing import DATA_HASH
from library.errors import UserError
from library.families.registry import FAMILIES
from library.families.shared.recognition import FAMILY_OF
from library.model_tools.model_layers import open_model_file
from library.runtime.logs import progress

if TYPE_CHECKING:
    from library.model_tools.weights import WeightFile

# What is true of a result if it is true of the model that it was made from.
_KEPT = ("architecture", "implementation", "prediction_type", "resolution")


def merged_metadata(
    path: Path, models: Sequence[WeightFile], ratios: Sequence[float], how: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata of a weighted sum of models: modelspec, and the recipe under the names that web UIs read.

    `sd_merge_recipe` is a JSON object; `sd_merge_models` has name, old hash and recipe of each model by its sha256.
    """
    hashed = file_hashes([model.path for model in models])
    recipe = {
        "type": version.NAME,
        "models": [model.path.name for model in models],
        "hashes": hashed,
        "ratios": list(ratios),
        **how,
    }
    inputs = {
        sha256: {
            "name": model.path.name,
            "legacy_hash": hashes.legacy_file_hash(model.path),
            "sd_merge_recipe": _earlier(model.metadata.get("sd_merge_recipe")),
        }
        for sha256, model in zip(hashed, models, strict=True)
    }
    earlier: dict[str, Any] = {}
    for model in models:
        known = _earlier(model.metadata.get("sd_merge_models"))
        earlier |= known if isinstance(known, dict) else {}
    titles = ", ".join(model.metadata.get("modelspec.title") or model.path.stem for model in models)
    return {
        **modelspec(path, {**file_facts(models[0]), **models[0].metadata}, {"merged_from": titles}),
        "sd_merge_recipe": json.dumps(recipe),
        "sd_merge_models": json.dumps({**earlier, **inputs}),
    }


def modelspec(path: Path, source: Mapping[str, str], facts: Mapping[str, str]) -> dict[str, str]:
    """The modelspec.* keys of a file that is made from another.

    Args:
        path: the file, whose stem is its title.
        source: metadata of the other file.
        facts: further keys without "modelspec.", which win.
    """
    kept = {key: source[f"modelspec.{key}"] for key in _KEPT if f"modelspec.{key}" in source}
    spec = {
        "sai_model_spec": "1.0.1",
        **kept,
        "title": path.stem,
        "date": datetime.now().replace(microsecond=0).isoformat(),
        "implementation_version": f"{version.NAME}/{version.VERSION}",
        "hash_sha256": f"0x{DATA_HASH}",
        **facts,
    }
    return {f"modelspec.{key}": value for key, value in spec.items()}


def of_whole_model(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a family says of a model (see `Writer.metadata`), as the model's own file has it."""
    own = dict(facts)
    whole = own.pop("modelspec.whole", None)
    return own if whole is None else {**own, "modelspec.architecture": whole}


def file_facts(file: WeightFile) -> dict[str, Any]:
    """The modelspec.* values that a model's names and shapes show; empty where it is no whole model."""
    if "modelspec.architecture" in file.metadata or file.kind not in FAMILY_OF:
        return {}
    try:
        model = open_model_file(file.path, FAMILIES).model
    except UserError:  # a part that is missing: it is merged all the same
        return {}
    return {**of_whole_model(model.facts), "modelspec.implementation": model.original_code}


def file_hashes(paths: Sequence[Path]) -> list[str]:
    """sha256 of whole files, with a bar."""
    with progress(sum(map(os.path.getsize, paths)), "hashing", unit="B", unit_scale=True) as bar:
        return [hashes.file_hash(path, bar.update) for path in paths]


def _earlier(text: str | None) -> Any:
    """A value of an input's metadata; nothing where it is no JSON."""
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return None
