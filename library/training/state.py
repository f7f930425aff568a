"""The training state on disk: what a run needs to continue as if it had not stopped.

Random streams are not part of it: they follow from the seed and the number of steps done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from library.checkpoints.writing import bytes_of
from library.errors import UserError
from library.training.resuming import report_data
from library.training.state_notes import (
    EXTRA,
    MODEL,
    OPTIMIZER,
    SCALER,
    SCHEDULE,
    read_progress,
    read_settings,
    write_notes,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.training.plan import Progress
    from library.training.resuming import RunSettings

_OF_OTHER_CONTENTS = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError)


@dataclass(frozen=True)
class StateParts:
    """What a state consists of: objects with state_dict and load_state_dict."""

    trained: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None = None  # of fp16
    extra: Mapping[str, Any] | None = None  # others by name; `restart` is called where a state lacks one


def save_state(
    folder: Path,
    parts: StateParts,
    progress: Progress,
    seed: int,
    *,
    settings: Mapping[str, Any] | None = None,
    gather: bool = False,
    write: bool = True,
) -> None:
    """Writes a state folder in the layout of accelerate, under a temporary name until it is complete and on disk.

    Args:
        settings: see `resuming.RunSettings`.
        gather: whether weights are sharded over processes; then all of them call this.
        write: whether this process is the one that writes.
    Raises: OSError: the disk is full or the folder cannot be written; an earlier state of this name stays.
    """
    from library.checkpoints.writing import write_safetensors, write_torch
    from library.runtime.durable import replacing_folder

    gathered: Callable[[Any], Any] = _unchanged
    if gather:
        from library.training.sharding import full_tensors

        gathered = partial(full_tensors, keep=write)
    trained, optimizer = gathered(parts.trained.state_dict()), gathered(parts.optimizer.state_dict())
    extra = {name: gathered(part.state_dict()) for name, part in (parts.extra or {}).items()}
    if not write:
        return
    with replacing_folder(folder) as fresh:
        write_safetensors(fresh / MODEL, {name: t.detach().cpu().contiguous() for name, t in trained.items()})
        write_torch(fresh / OPTIMIZER, optimizer)
        write_torch(fresh / SCHEDULE, parts.schedule.state_dict())
        if parts.scaler is not None:
            write_torch(fresh / SCALER, parts.scaler.state_dict())
        if extra:
            write_torch(fresh / EXTRA, extra)
        write_notes(fresh, progress, seed, settings)


def load_state(folder: Path, parts: StateParts, *, settings: RunSettings | None = None, sharded: bool = False) -> None:
    """Loads the parts from a state folder. Options that differ from those of then are applied, see `resuming`.

    Args:
        settings: those of this run; None: nothing is compared.
        sharded: whether weights are sharded over processes; then all of them call this.
    Raises: UserError: the state is of another network, optimizer or schedule, or a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / MODEL)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--resume: {folder / MODEL} cannot be read ({error}); choose an earlier state") from None
    shard_like, shard_optimizer_state = _first, _first
    if sharded:
        from library.training import sharding

        shard_like, shard_optimizer_state = sharding.shard_like, sharding.shard_optimizer_state
    wanted = {name: tuple(tensor.shape) for name, tensor in parts.trained.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise UserError(
            f"--resume: {folder} is the state of another network or model: {len(different)} of {len(wanted)} tensors "
            f"are missing or of another shape, the first is {different[0]}; give the options of the run that saved it"
        )
    parts.trained.load_state_dict(shard_like(tensors, parts.trained.state_dict()))
    _load_optimizer(folder, parts, settings, shard_optimizer_state)
    if parts.scaler is not None and (folder / SCALER).is_file():
        _load(parts.scaler, folder / SCALER, "--mixed_precision")
    if not parts.extra:
        return
    file = folder / EXTRA
    saved = _read(file) if file.is_file() else {}
    for name, part in parts.extra.items():
        if not isinstance(saved, dict) or name not in saved:
            part.restart()
            continue
        try:
            part.load_state_dict(shard_like(saved[name], part.state_dict()))
        except _OF_OTHER_CONTENTS as error:
            raise _misfit(file, "the options", str(error) or type(error).__name__) from None


def _load_optimizer(
    folder: Path, parts: StateParts, settings: RunSettings | None, shard_optimizer_state: Callable[..., Any]
) -> None:
    """Loads optimizer and schedule, and applies the options that have changed."""
    from library.training import optimizer_states
    from library.training.resuming import SettingChanges

    before = read_settings(folder)
    changes = None if settings is None else SettingChanges(parts.optimizer, parts.schedule, settings, before)

    def fitting_state(saved: Any) -> Any:
        optimizer_states.check(saved, parts.optimizer)
        return shard_optimizer_state(saved, parts.optimizer)

    _load(parts.optimizer, folder / OPTIMIZER, "--optimizer_type and --optimizer_args", fitting_state)
    file, options = folder / SCHEDULE, "--lr_scheduler"
    if changes is None:
        _load(parts.schedule, file, options)
        return
    report_data(before.get("data"), settings.data)
    changes.to_groups()
    saved = _read(file)
    if not isinstance(saved, dict):
        raise _misfit(file, options, "it is no state of a schedule")
    progress = read_progress(folder)
    if changes.to_schedule(saved, 0 if progress is None else progress.step):
        return
    ours = parts.schedule.state_dict()
    odd = [name for name, value in saved.items() if name in ours and not optimizer_states.alike(ours[name], value)]
    if odd:
        raise _misfit(file, options, f"its {odd[0]} is {str(saved[odd[0]])[:40]}")
    _load(parts.schedule, file, options)


def needed_bytes(parts: StateParts) -> int:
    """About how many bytes a saved model and its state take: the trained tensors twice, and the optimizer's."""
    return 2 * bytes_of(parts.trained.state_dict()) + bytes_of(parts.optimizer.state_dict())


def _unchanged(value: Any) -> Any:
    return value


def _first(value: Any, _: Any) -> Any:
    return value


def _load(part: Any, file: Path, options: str, prepare: Callable[[Any], Any] = _unchanged) -> None:
    try:
        part.load_state_dict(prepare(_read(file)))
    except _OF_OTHER_CONTENTS as error:
        raise _misfit(file, options, str(error) or type(error).__name__) from None


def _misfit(file: Path, options: str, why: str) -> UserError:
    return UserError(f"--resume: {file} does not fit {options} ({why}); give those of the run that saved it")


def _read(file: Path) -> Any:
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0] or "it is empty"
        raise UserError(f"--resume: {file} cannot be read ({reason}); choose an earlier state") from None
