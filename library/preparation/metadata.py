"""Writes metadata files of fine-tuning data sets. They are read by `library.data.metadata_files`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.preparation.texts import write_text


def write_metadata(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes ``{key: {"caption": ..., "tags": ...}}`` in the order it has; as JSON Lines where the name ends so.

    Raises: UserError: it cannot be written; an earlier file is as it was.
    """
    if path.suffix.lower() == ".jsonl":
        lines = [_json({"image_path": key, **entry}) for key, entry in entries.items()]
        write_text(path, "".join(f"{line}\n" for line in lines))
    else:
        write_text(path, _json(entries, indent=2) + "\n")


def _json(value: Any, **layout: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **layout)
