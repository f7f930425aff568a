"""The training state on disk: what a run needs to go on as if it had not stopped.

Random streams are not part of it. They follow from the seed and from how many steps are done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.version import NAME, VERSION

if TYPE_CHECKING:
    import torch
    from torch import nn

MODEL, OPTIMIZER, SCHEDULE, SCALER = "model.safetensors", "optimizer.bin", "scheduler.bin", "scaler.pt"
EXTRA = "extra.bin"
PROGRESS = "train_state.json"  # the last file to be written


@dataclass(frozen=True)
class Progress:
    """How far a run was."""

    step: int  # optimizer steps done
    epoch: int  # the epoch of that step, from 1
    seed: int | None  # None: an earlier trainer's state, which does not tell
    epoch_ended: bool = True  # False: what happens at the end of that epoch is still to be done, if it is over


@dataclass(frozen=True)
class Parts:
    """What a state consists of. All have state_dict and load_state_dict."""

    trained: nn.Module
    optimizer: Any
    schedule: Any
    scaler: Any | None = None  # of fp16
    extra: Mapping[str, Any] | None = None  # what else is kept between steps, by name; `restart` where a state lacks it


def read_progress(folder: Path) -> Progress | None:
    """What the state tells of itself; None: an earlier trainer's state of a whole model, which tells nothing.

    Raises: UserError: the folder holds no state, or one whose saving was cut off.
    """
    if not folder.is_dir():
        raise UserError(f"--resume: there is no folder {folder}")
    missing = [name for name in (MODEL, OPTIMIZER, SCHEDULE) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"--resume: {folder} is no whole state, it has no {missing[0]}; choose an earlier one")
    file = folder / PROGRESS
    if not file.is_file():
        return None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        step, epoch = int(told["current_step"]), int(told["current_epoch"])
        return Progress(step, epoch, told.get("seed"), told.get("epoch_ended", True))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--resume: {file} cannot be read; choose an earlier state") from None


def save_state(folder: Path, parts: Parts, progress: Progress, *, gather: bool = False, write: bool = True) -> None:
    """Writes a state folder, in the layout of accelerate; it takes its name when everything is in it.

    Args:
        gather: whether weights are spread over processes; then all of them call this.
        write: whether this process is the one that writes.
    Raises: OSError: the disk is full or the folder cannot be written; an earlier state of this name stays.
    """
    import torch

    from library.checkpoints.writing import write_safetensors
    from library.runtime.durable import replacing_folder

    whole: Callable[[Any], Any] = _unchanged
    if gather:
        from library.training.sharding import whole as gathered

        whole = partial(gathered, keep=write)
    trained, optimizer = whole(parts.trained.state_dict()), whole(parts.optimizer.state_dict())
    extra = {name: whole(part.state_dict()) for name, part in (parts.extra or {}).items()}
    if not write:
        return
    with replacing_folder(folder) as fresh:
        write_safetensors(fresh / MODEL, {name: t.detach().cpu().contiguous() for name, t in trained.items()})
        torch.save(optimizer, fresh / OPTIMIZER)
        torch.save(parts.schedule.state_dict(), fresh / SCHEDULE)
        if parts.scaler is not None:
            torch.save(parts.scaler.state_dict(), fresh / SCALER)
        if extra:
            torch.save(extra, fresh / EXTRA)
        told = {"current_epoch": progress.epoch, "current_step": progress.step, "seed": progress.seed}
        told["epoch_ended"] = progress.epoch_ended
        text = json.dumps({**told, "made_by": f"{NAME} {VERSION}"}, indent=2)
        (fresh / PROGRESS).write_text(text, encoding="utf-8")


def load_state(folder: Path, parts: Parts, *, spread: bool = False) -> None:
    """Fills the parts from a state folder.

    Args: spread: whether weights are spread over processes; then all of them call this.
    Raises: UserError: the state is of another network, optimizer or schedule, or a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / MODEL)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--resume: {folder / MODEL} cannot be read ({error}); choose an earlier state") from None
    spread_like, spread_optimizer_state = _spreading() if spread else (_first, _first)
    _fill(parts.trained, tensors, folder, spread_like)
    optimizer_options = "--optimizer_type and --optimizer_args"
    _load(parts.optimizer, folder / OPTIMIZER, optimizer_options, lambda s: spread_optimizer_state(s, parts.optimizer))
    _load(parts.schedule, folder / SCHEDULE, "--lr_scheduler")
    if parts.scaler is not None and (folder / SCALER).is_file():
        _load(parts.scaler, folder / SCALER, "--mixed_precision")
    if parts.extra:
        found = _read(folder / EXTRA) if (folder / EXTRA).is_file() else {}
        for name, part in parts.extra.items():
            if name in found:
                part.load_state_dict(spread_like(found[name], part.state_dict()))
            else:
                part.restart()


def needed_bytes(parts: Parts) -> int:
    """About how much a model and its state take: the trained tensors twice, and the optimizer's."""
    return 2 * size_of(parts.trained.state_dict()) + size_of(parts.optimizer.state_dict())


def size_of(value: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    if isinstance(value, Mapping):
        return sum(size_of(one) for one in value.values())
    return sum(map(size_of, value)) if isinstance(value, list | tuple) else 0


def _unchanged(value: Any) -> Any:
    return value


def _spreading() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from library.training.sharding import spread_like, spread_optimizer_state

    return spread_like, spread_optimizer_state


def _first(value: Any, _: Any) -> Any:
    return value


def _fill(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], folder: Path, spread_like: Callable[..., Any]
) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise UserError(
            f"--resume: {folder} is the state of another network or model: {len(different)} of {len(wanted)} tensors "
            f"are missing or of another shape, the first is {different[0]}; give the options of the run that saved it"
        )
    module.load_state_dict(spread_like(tensors, module.state_dict()))


def _load(part: Any, file: Path, options: str, prepare: Callable[[Any], Any] = _unchanged) -> None:
    try:
        part.load_state_dict(prepare(_read(file)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{file} does not fit {options} ({str(error) or type(error).__name__})"
        raise UserError(f"--resume: {reason}; give those of the run that saved it") from None


def _read(file: Path) -> Any:
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or "it is empty"
        raise UserError(f"--resume: {file} cannot be read ({reason}); choose an earlier state") from None
