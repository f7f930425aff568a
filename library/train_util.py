"""Names under which other programs import what they need. The real things are elsewhere: see `embedding`."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from library.checkpoints.hashes import network_hashes
from library.data.sample.bucket_manager import BucketManager
from library.embedding import read_config_from_file

__all__ = [
    "BucketManager",
    "precalculate_safetensors_hashes",
    "read_config_from_file",
    "verify_command_line_training_args",
]


def verify_command_line_training_args(args: Namespace) -> None:
    """Does nothing: options are checked when the training starts."""


def precalculate_safetensors_hashes(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` of a network file."""
    hashes = network_hashes(tensors, metadata)
    return hashes["sshs_model_hash"], hashes["sshs_legacy_hash"]
