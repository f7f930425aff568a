"""Models of the hub and of folders in transformers' layout, and weight files behind an address."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from library.checkpoints.keymap import first_few
from library.errors import UserError
from library.families.shared import hub
from library.families.shared.building import freeze
from library.families.shared.recognition import is_hub_id
from library.preparation.common.images import by_the_first, is_first
from library.runtime.durable import replacing
from library.runtime.logs import LOGGER, progress
from library.runtime.paths import cache_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")

_TIMEOUT = 30.0  # seconds without an answer
_BLOCK = 1 << 20  # bytes read at a time


def load(name: str, loader: Callable[..., T], what: str) -> T:
    """What `loader(name, local_files_only=...)` makes of a folder or a hub model; the hub is asked only where its
    cache does not have the files.

    Args:
        loader: a `from_pretrained` of transformers.
        what: for messages, e.g. "a BLIP model".
    Raises: UserError: it is not there, or cannot be read as that.
    """
    is_folder = os.path.isdir(name)
    if not is_folder and not is_hub_id(name):
        raise UserError(f"{name}: no such folder (and not a hub id of the form owner/model)")
    # transformers would ask the hub to convert old weight files, in a thread that outlives an error.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    try:
        return loader(name, local_files_only=True)
    except ImportError as error:
        raise _lacks_package(name, error) from None
    except Exception as error:  # transformers and what it is built on raise nearly everything
        if is_folder:
            raise UserError(f"{name}: cannot be read as {what} ({_first_line(error)})") from None
    why = hub.no_answer(name)
    try:
        if why is None:
            return loader(name, local_files_only=False)
    except ImportError as error:
        raise _lacks_package(name, error) from None
    except Exception as error:
        why = _first_line(error)
    raise UserError(
        f"{name}: neither a local folder, nor whole in the hub's cache, and the hub does not provide it as {what} "
        f"({why})"
    )


def load_model(name: str, model_class: Any, what: str, **options: Any) -> nn.Module:
    """A model of transformers with all of its weights, frozen, in eval mode. Raises: UserError: see `load`."""

    from transformers.utils.logging import disable_progress_bar

    def loader(name: str, **where: Any) -> Any:
        return model_class.from_pretrained(name, output_loading_info=True, **options, **where)

    disable_progress_bar()  # of weights going into memory; that of a download stays
    model, info = load(name, loader, what)
    if info["missing_keys"]:  # transformers would use random numbers in their place
        raise UserError(f"{name}: not {what}; it lacks {first_few(sorted(info['missing_keys']))}")
    return freeze(model)


def placed() -> torch.device:
    """The device that this process works on: its GPU where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def fetched(address: str) -> Path:
    """The file behind an http(s) address, from the cache folder; it is fetched there the first time.

    Every process calls this, and the first one fetches. A file that was cut short on its way is not kept.

    Raises: UserError: it cannot be downloaded.
    """
    from http.client import HTTPException
    from urllib.request import urlopen

    path = cache_folder() / "weights" / (unquote(urlsplit(address).path).rpartition("/")[2] or "weights.pth")

    def fetch() -> None:
        if path.is_file():
            return
        LOGGER.info("fetching %s into %s", address, path.parent)
        try:
            with urlopen(address, timeout=_TIMEOUT) as answer, replacing(path) as temporary:
                length = int(answer.headers.get("Content-Length") or 0)
                size = 0
                progress_bar = progress(length or None, path.name, unit="B", unit_scale=True, disable=not is_first())
                with open(temporary, "wb") as file, progress_bar as bar:
                    while block := answer.read(_BLOCK):
                        file.write(block)
                        size += len(block)
                        bar.update(len(block))
                if length and size != length:
                    raise OSError(f"cut short, {size:,} of {length:,} bytes")
        except (OSError, ValueError, HTTPException) as error:  # URLError is an OSError
            raise UserError(
                f"{address}: cannot be downloaded ({_first_line(error)}); get the file otherwise and put it at "
                f"{path}, or name a file, folder or hub id here"
            ) from None

    by_the_first(fetch)
    fetch()  # where the first process is on another machine
    return path


def _lacks_package(name: str, error: ImportError) -> UserError:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return UserError(f"{name}: transformers needs a further package to read it: {lines[0] if lines else error!r}")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
