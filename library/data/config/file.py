"""Reads a dataset config (TOML or JSON) and checks its shape, so that the rest can trust keys and types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.data.config.schema import DATASET, GENERAL, NOT_IN_STYLE, SUBSET, as_meant, check_table
from library.errors import UserError
from library.runtime.documents import parse_json, parse_toml, read_text


def read_config(path: Path) -> dict[str, Any]:
    """The config with its keys and types checked: ``{"general": {...}, "datasets": [{..., "subsets": [...]}]}``.

    Raises: UserError: the file is missing, malformed, or has unknown keys, wrong types or no datasets.
    """
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise UserError(f"--dataset_config: {path} must be a .toml or a .json file")
    text = read_text(path, "the dataset config", option="--dataset_config")
    config = parse_toml(text, path) if suffix == ".toml" else parse_json(text, path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold one object with general and datasets")
    problems = [f"{path}: unknown table '{name}'; known are general, datasets" for name in config.keys() - _TABLES]
    general, datasets = config.get("general", {}), config.get("datasets", [])
    if isinstance(general, Mapping):
        general = as_meant(general)
        problems += check_table(general, GENERAL, f"{path}, [general]")
    else:
        problems.append(f"{path}: general must be a table, [general]")
    if not _are_tables(datasets):
        problems.append(f"{path}: no datasets; write at least one [[datasets]] with one [[datasets.subsets]]")
        datasets = []
    datasets = [as_meant(dataset) for dataset in datasets]
    for number, dataset in enumerate(datasets, 1):
        if _are_tables(dataset.get("subsets")):
            dataset["subsets"] = [as_meant(subset) for subset in dataset["subsets"]]
        problems += _check_dataset(dataset, f"{path}, [[datasets]] {number}")
    if problems:
        raise UserError(*problems)
    return {"general": general, "datasets": datasets}


_TABLES = {"general", "datasets"}


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(one, Mapping) for one in value)


def _check_dataset(dataset: Mapping[str, Any], place: str) -> list[str]:
    own = {name: value for name, value in dataset.items() if name != "subsets"}
    problems = list(check_table(own, DATASET, place))
    subsets = dataset.get("subsets", [])
    if not _are_tables(subsets):
        return [*problems, f"{place}: no subsets; write at least one [[datasets.subsets]] with an image_dir"]
    styles = {"metadata_file" in subset for subset in subsets}
    if len(styles) > 1:
        problems.append(f"{place}: some subsets have metadata_file and some have not; put them into two datasets")
    for number, subset in enumerate(subsets, 1):
        where = f"{place}, [[datasets.subsets]] {number}"
        problems += check_table(subset, SUBSET, where)
        if "image_dir" not in subset and "metadata_file" not in subset:
            problems.append(f"{where}: image_dir is missing")
        for style, meaningless in NOT_IN_STYLE.items():
            if style in subset:
                problems += [f"{where}: {name} has no meaning with {style}" for name in meaningless if name in subset]
    return problems
