"""`metadata_cache.json`: sizes and captions of a folder's images, in the form that earlier trainers keep them in."""

from __future__ import annotations

import json
import ntpath
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from library.data.scan.metadata_files import as_size
from library.errors import UserError
from library.runtime.documents import JsonError, load_json
from library.runtime.durable import replacing
from library.runtime.files import read_bytes, reason
from library.runtime.logs import LOGGER
from library.types import Size

FILE_NAME = "metadata_cache.json"


class Info(NamedTuple):
    """The caption and size of one image."""

    caption: str  # as the caption file says; several lines are several captions (enable_wildcard)
    size: Size


def read(folder: Path) -> dict[Path, Info] | None:
    """The entries of the folder's file, by ``folder / file name``; None: there is no such file.

    The file holds paths as they were written, perhaps in another place or on another system; only their file names
    count. Nothing is compared with the folder: images may have come, gone or changed since. Earlier trainers recorded
    sizes as stored, before EXIF orientation turns the image: width and height may be exchanged.

    Raises: UserError: the file cannot be read, or is malformed.
    """
    file = folder / FILE_NAME
    try:
        content = load_json(read_bytes(file))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({reason(error)}); delete it, and it is made again") from None
    except JsonError:
        raise _damaged(file, "no JSON text in UTF-8") from None
    if not isinstance(content, dict):
        raise _damaged(file, "not one object")
    infos: dict[Path, Info] = {}
    for key, value in content.items():
        said = value if isinstance(value, dict) else {}
        caption, size = said.get("caption"), as_size(said.get("resolution"))
        if not isinstance(caption, str) or size is None:
            raise _damaged(file, f"'{key}' has no caption and resolution")
        # Both separators may stand in one path. Only in a path of this very folder a backslash may be part of the name.
        head, name = os.path.split(key)
        infos[folder / (name if head == str(folder) else ntpath.basename(key))] = Info(caption, size)
    return infos


def write(folder: Path, infos: Mapping[Path, Info]) -> bool:
    """Writes the folder's file, in the order of `infos`. False, after a warning, if the folder cannot be written."""
    file = folder / FILE_NAME
    content = {str(path): {"caption": info.caption, "resolution": list(info.size)} for path, info in infos.items()}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    try:
        with replacing(file) as temporary:
            # File names that are not UTF-8 hold lone surrogates, which JSON can only say as \udcxx.
            temporary.write_bytes(text.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        LOGGER.warning(f"{file}: cannot be written ({error.strerror}); sizes and captions are not kept for next time")
        return False
    return True


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file}: damaged ({reason}); delete it, and it is made again")
