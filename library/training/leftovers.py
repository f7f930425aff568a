"""What killed runs have left under the names of a run: named and removed, or restored where nothing else is whole."""

from __future__ import annotations

import os
import re
from pathlib import Path

from library.options.saving import SavingOptions, output_place, sample_place
from library.runtime import durable
from library.runtime.logs import LOGGER
from library.training.state_notes import is_whole

_KINDS = r"(-step\d{8,}|-\d{6,}|-best)?(-state|[._].*)?"  # of copies, and what their names end in


def clear(options: SavingOptions) -> None:
    """Looks for them where the run is to save. Whatever a living run writes stays.

    A state that was being put in the place of an earlier one, or that was whole but had no name yet, gets its name if
    there is none of that name. All else is removed. What cannot be removed is left.
    """
    folder, stems = output_place(options)
    ours = re.compile("|".join(f"(?:{re.escape(stem)}{_KINDS})" for stem in stems), re.DOTALL)

    def concerns(name: str) -> bool:
        cut = durable.beginning(folder / f"{name}\U00010000") == name  # nothing more would fit
        return ours.fullmatch(name) is not None or (
            cut and any(s.startswith(name) or name.startswith(s) for s in stems)
        )

    ending = durable.backup_of(Path("x")).name.removeprefix("x")  # where two names cannot be exchanged
    names = [entry.name.removesuffix(ending) for entry in folder.glob(f"*{ending}") if entry.is_dir()]
    for name in names:
        if ours.fullmatch(name) and durable.recover(folder / name):
            LOGGER.warning("%s has been restored; a killed run was replacing it", folder / name)
    for leftover in durable.abandoned(folder, concerns):
        files = leftover.path.rglob("*") if leftover.path.is_dir() else [leftover.path]
        size = sum(file.lstat().st_size for file in files if file.is_file())
        restored = _restored(leftover)
        try:
            durable.remove(leftover.path)
        except OSError as error:
            LOGGER.warning("%s: was left by a killed run, and cannot be removed (%s)", leftover.path, error.strerror)
            continue
        if restored:
            LOGGER.warning("%s was complete and has been renamed; a killed run had not done so", leftover.target)
        else:
            LOGGER.warning("removed %s (%.1f MiB), which a killed run had left", leftover.path, size / 2**20)
    samples, start = sample_place(options)
    for leftover in durable.abandoned(samples, lambda name: name.startswith(start) and name.endswith(".png")):
        durable.remove(leftover.path)


def _restored(leftover: durable.Leftover) -> bool:
    """Gives a state its name if no other has it and it is whole."""
    if os.path.lexists(leftover.target) or not leftover.path.is_dir():
        return False
    old, fresh = leftover.path / durable.OLD, leftover.path / durable.FRESH
    whole = old if old.is_dir() else fresh if is_whole(fresh) else None  # an old one had its name once
    if whole is None:
        return False
    try:
        os.rename(whole, leftover.target)
    except OSError:
        return False
    durable.flush_folder(leftover.target.parent)
    return True
