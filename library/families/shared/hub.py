"""Diffusers models of the hub as folders on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from library.errors import UserError

ENDINGS = ("*.json", "*.safetensors", "*.txt", "*.model")  # also of tokenizers; no weights in other formats


def hub_folder(name: str, parts: Iterable[str], problem_of: Callable[[Path], str | None]) -> Path:
    """The folder of a hub model in the hub's cache. The hub is asked only where the cache does not have the model.

    Args:
        name: hub id.
        parts: subfolders that are needed, as far as the model has them.
        problem_of: what a folder lacks; may raise UserError.
    Raises: UserError: the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", *(f"{part}/{ending}" for part in parts for ending in ENDINGS)]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        if problem_of(folder) is None:
            return folder
    except (OSError, ValueError, UserError):
        pass  # not in the cache, or not all of it
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # whatever the hub's client and the network may raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: neither a file or folder here, nor in the hub's cache, and the hub did not give it ({reason})"
        ) from None
