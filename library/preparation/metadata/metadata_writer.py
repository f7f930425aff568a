"""Writes metadata files of fine-tuning data sets. They are read by `library.data.scan.metadata_files`."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.preparation.common.texts import write_text

NOT_UNICODE = "the name is not Unicode text, so no metadata file can hold it; rename the file"


def write_metadata(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes ``{key: {"caption": ..., "tags": ...}}`` in the order it has; as JSON Lines where the name ends so.

    Raises: UserError: it cannot be written; an earlier file is as it was.
    """
    if path.suffix.lower() == ".jsonl":
        lines = [_json({"image_path": key, **entry}) for key, entry in entries.items()]
        write_text(path, "".join(f"{line}\n" for line in lines))
    else:
        write_text(path, _json(entries, indent=2) + "\n")


def require_writable(path: Path, name: str) -> None:
    """Checks that `path` can be written, before work that may take hours.

    Args:
        name: what the user calls the file, e.g. "--output_path".
    Raises: UserError: no file can be made where `path` is to be.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise UserError(f"{name}: {path} cannot be written ({error.strerror or error})") from None


def is_unicode(text: str) -> bool:
    """Whether files can hold a text. Names of files may hold bytes that are no Unicode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _json(value: Any, **layout: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, **layout)
    # Halves of characters, which other programs leave where they cut a text, can only be written as JSON's escapes.
    return text if is_unicode(text) else json.dumps(value, **layout)
