"""The notes of a state folder, read without torch: progress and settings of the run, checksums of the files.

All of it stands in ``train_state.json``, which is written last. Earlier trainers, and earlier versions of this one,
note less: what is missing is not checked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.runtime.documents import load_json
from library.runtime.files import open_regular, path_problem, read_bytes
from library.training.plan import Progress
from library.version import NAME, VERSION

MODEL, OPTIMIZER, SCHEDULE, SCALER = "model.safetensors", "optimizer.bin", "scheduler.bin", "scaler.pt"
EXTRA = "extra.bin"
PROGRESS = "train_state.json"

_CHUNK = 1 << 24  # bytes
_MOST_STEPS = 10**12
_LARGEST_SEED = 2**32 - 1  # as --seed
_LARGEST_NOTES = 1 << 26  # bytes


def read_progress(folder: Path) -> Progress | None:
    """The progress of the run when it saved the state; its micro_step, which follows from the plan, is 0.

    None: an earlier trainer's state of a whole model, without notes.

    Raises: UserError: the folder holds no state, or one that was not saved to its end, or impossible values.
    """
    if not os.path.isdir(folder):  # a name that is too long is none
        why = path_problem(folder, "folder") or ""
        hidden = why.startswith("it cannot")
        raise UserError(f"--resume: {folder}: {why}" if hidden else f"--resume: there is no folder {folder}")
    if not os.access(folder, os.X_OK):
        raise UserError(f"--resume: {folder}: no permission to look into it")
    missing = [name for name in (MODEL, OPTIMIZER, SCHEDULE) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"--resume: {folder} is no whole state, it has no {missing[0]}; choose an earlier one")
    notes = _read(folder)
    if notes is None:
        return None
    step = _count(folder, notes, "current_step", 0, _MOST_STEPS)
    epoch = _count(folder, notes, "current_epoch", min(step, 1), step + 1)  # each epoch has a step
    ended = notes.get("epoch_ended", True)
    if not isinstance(ended, bool):
        raise _impossible(folder, "epoch_ended", ended)
    return Progress(step, epoch, epoch_ended=ended)


def read_seed(folder: Path) -> int | None:
    """The seed of the run that saved the state; None for an earlier trainer's state, which may have none.

    Raises: UserError: no notes that can be read, or an impossible value.
    """
    notes = _read(folder) or {}
    return None if notes.get("seed") is None else _count(folder, notes, "seed", 0, _LARGEST_SEED)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run that saved the state, see `resuming.RunSettings`; empty without such a note.

    Raises: UserError: the note is damaged.
    """
    settings = (_read(folder) or {}).get("made_with", {})
    if not isinstance(settings, dict):
        raise _impossible(folder, "made_with", settings)
    return settings


def write_notes(folder: Path, progress: Progress, seed: int, settings: Mapping[str, Any] | None = None) -> None:
    """Writes ``train_state.json`` beside the other files of a state, with their checksums. Raises: OSError."""
    notes = {"current_epoch": progress.epoch, "current_step": progress.step, "seed": seed}
    notes["epoch_ended"] = progress.epoch_ended
    if settings:
        notes["made_with"] = dict(settings)
    notes["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())
    }
    text = json.dumps({**notes, "made_by": f"{NAME} {VERSION}"}, indent=2)
    (folder / PROGRESS).write_text(text, encoding="utf-8")


def verify(folder: Path) -> None:
    """Compares the files of a state with their checksums, where it has some.

    Raises: UserError: a file is not what was saved.
    """
    reason = _invalid_reason(folder, (_read(folder) or {}).get("files", {}))
    if reason:
        raise UserError(f"--resume: {reason}; choose an earlier state")


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a state with all that it was saved with; False for those without checksums."""
    try:
        notes = _read(folder) or {}
    except UserError:
        return False
    files = notes.get("files", {})
    return {MODEL, OPTIMIZER, SCHEDULE} <= files.keys() and _invalid_reason(folder, files) is None


def _read(folder: Path) -> dict[str, Any] | None:
    file = folder / PROGRESS
    if not file.is_file():
        return None
    try:
        notes = load_json(read_bytes(file, _LARGEST_NOTES))
        if not isinstance(notes, dict) or not isinstance(notes.get("files", {}), dict):
            raise ValueError
    except (OSError, ValueError):
        raise UserError(f"--resume: {file} cannot be read; choose an earlier state") from None
    return notes


def _count(folder: Path, notes: Mapping[str, Any], name: str, least: int, most: int) -> int:
    """A whole number between `least` and `most`; 4.0 is 4. Raises: UserError."""
    value = notes.get(name)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or not least <= value <= most:
        raise _impossible(folder, name, value)
    return int(value)


def _impossible(folder: Path, name: str, value: Any) -> UserError:
    text = repr(value)
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    return UserError(f"--resume: {folder / PROGRESS}: {name} cannot be {shown}; choose an earlier state")


def _invalid_reason(folder: Path, files: Mapping[str, Any]) -> str | None:
    """The problem with the first file that differs from its entry; None: all are as they were saved."""
    for name, notes in files.items():
        path = folder / Path(name).name
        wanted = (notes.get("bytes"), notes.get("sha256")) if isinstance(notes, dict) else (None, None)
        try:
            size = path.stat().st_size
            if size != wanted[0]:
                return f"{path} has {size:,} bytes and was saved with {wanted[0]}"
            if _sha256(path) != wanted[1]:
                return f"{path} is damaged, its checksum is another than when it was saved"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror or error})"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
