"""Weights that runs have written, compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open


def hash_of(file: Path) -> str:
    """The hash that a network's file tells of its tensors."""
    with safe_open(file, "pt") as opened:
        return opened.metadata()["sshs_model_hash"]


def furthest(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    """The largest difference between two numbers of the same name; the names must be the same."""
    assert left.keys() == right.keys()
    return max((left[key].float() - right[key].float()).abs().max().item() for key in left)
