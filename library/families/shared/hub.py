"""The Hugging Face hub: whether it answers, and its Diffusers models as folders on this machine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from library.errors import UserError
from library.families.shared.recognition import read_json

_INDEX = "*.safetensors.index.json"  # lists the files of sharded weights
ENDINGS = ("*.json", "*.safetensors", "*.txt", "*.model")  # also of tokenizers; no weights in other formats
_TIMEOUT = 30.0  # seconds without an answer


def no_answer(name: str) -> str | None:
    """Why the hub cannot be asked for a repository, in a few words; None: it answers, be it that there is none.

    It is asked once. The clients that fetch single files ask a hub that cannot be reached again and again, file by
    file, and print a warning each time, for a minute or more.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=_TIMEOUT)
    except (HfHubHTTPError, ValueError):  # ValueError: a mirror that lacks this part of the hub
        return None
    except Exception as error:  # whatever the hub's client and the network may raise
        return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return None


def hub_folder(
    name: str, parts: Iterable[str], problem_of: Callable[[Path], str | None], without_weights: Collection[str] = ()
) -> Path:
    """The folder of a hub model in the hub's cache. The hub is asked only where the cache does not have the model.

    Args:
        name: hub id.
        parts: subfolders that are needed, as far as the model has them.
        problem_of: what a folder lacks; may raise UserError.
        without_weights: those of the parts whose weights are not needed.
    Raises: UserError: the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    endings = {part: ENDINGS[:1] if part in without_weights else ENDINGS for part in parts}
    wanted = ["model_index.json", *(f"{part}/{ending}" for part in endings for ending in endings[part])]
    whole = [part for part in endings if part not in without_weights]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        if problem_of(folder) is None and not _without_weights(folder, whole):
            return folder
    except (OSError, ValueError, UserError):
        pass  # not in the cache, or not all of it
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # whatever the hub's client and the network may raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: neither a local file or folder, nor in the hub's cache, "
            f"and the hub does not provide it ({reason})"
        ) from None
    lacking = _without_weights(folder, whole)
    if lacking:  # without network, the hub's client gives what there is
        raise UserError(f"{name}: not all weights of {' and '.join(lacking)} are in the hub's cache, or on the hub")
    return folder


def _without_weights(folder: Path, parts: Iterable[str]) -> list[str]:
    """The subfolders that are not whole: a download was stopped, or only the configuration was needed."""
    found = []
    for part in parts:
        place = folder / part
        if not (place / "config.json").is_file():
            continue  # no model, such as a tokenizer, or none at all
        files = {path.name for path in place.glob("*.safetensors")}
        shards = {shard for index in place.glob(_INDEX) for shard in read_json(index).get("weight_map", {}).values()}
        if not files or not shards <= files:
            found.append(part)
    return found
