"""Checks before anything is loaded that a run can write its outputs: file names, folders, free disk space."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.sizes import weights_size
from library.errors import UserError
from library.options.saving import output_place, sample_place
from library.runtime.durable import LONGEST_NAME, fitting, work_folder
from library.training.saving import SavePlan, check_space, make_save_plan
from library.training.state_notes import MODEL, OPTIMIZER, PROGRESS, SCHEDULE

if TYPE_CHECKING:
    from library.options.base import Options

_SMALLEST_NETWORK = 1 << 20  # bytes; about what rank 1 of the smallest model takes
_LONGEST_EXTRA_FILE = "_t5xxl"  # the longest ending of a file that is saved beside a model
_MODEL_PARTS = ("model_index.json", "config.json")  # a folder that holds one of these may be replaced
_STATE_PARTS = (MODEL, OPTIMIZER, SCHEDULE, PROGRESS, "pytorch_model.bin")


def problems(opts: Options) -> list[str]:
    """One line per output that could not be saved. Leaves no file behind."""
    # The ending of saved models, "" for folders; without --save_model_as the loaded model decides.
    chosen, source = opts.saving.save_model_as, opts.model.pretrained_model_name_or_path or ""
    if chosen:
        suffix = "" if chosen.startswith("diffusers") else f".{chosen}"
    elif not opts.method.trains_model or (opts.saving.use_safetensors and os.path.isfile(source)):
        suffix = ".safetensors"
    else:
        suffix = (Path(source).suffix or ".safetensors") if os.path.isfile(source) else ""
    found = list(_name_problems(opts, make_save_plan(opts.saving, suffix, 1)))
    if opts.sampling.sample_prompts:
        folder, start = sample_place(opts.saving)
        found += _try_to_make(folder / fitting(start, "e000000_00_00000000000000_0000000000.png"), folder=False)
    if "tensorboard" in opts.logging.trackers:
        run = opts.logging.folder_of_run("0" * 14, opts.saving.output_name)  # as long as the date and time
        folders = [("--logging_dir", Path(opts.logging.logging_dir)), ("--log_prefix", run)]
        if opts.logging.log_tracker_name:
            folders.append(("--log_tracker_name", run / opts.logging.log_tracker_name))
        tried = ([*_try_to_make(folder, folder=True, option=option)] for option, folder in folders)
        found += next(filter(None, tried), [])  # of the first that cannot be made, from the outermost on
    if not found:
        try:
            check_space(output_place(opts.saving)[0], _smallest_copy(opts), "a copy of what is trained")
        except UserError as error:
            found += error.problems
    return list(dict.fromkeys(found))


def _name_problems(opts: Options, plan: SavePlan) -> Iterator[str]:
    saving = opts.saving
    copies = [plan.final_path()]
    if plan.every_epochs:
        copies.append(plan.epoch_path(1))
    if plan.every_steps:
        copies.append(plan.step_path(1))
    if getattr(opts.validation, "save_best_validation", False):
        copies.append(plan.best_path())
    for path in copies:
        yield from _try_to_make(path, folder=not plan.suffix)
    longest = max(copies, key=lambda path: len(path.name))
    if plan.suffix and (getattr(opts.family, "save_clip", False) or getattr(opts.family, "save_t5xxl", False)):
        yield from _try_to_make(longest.with_name(f"{longest.stem}{_LONGEST_EXTRA_FILE}{plan.suffix}"), folder=False)
    states = [plan.step_path(1)]  # what a signal leaves
    if saving.save_state or saving.save_state_on_train_end:
        states.append(plan.final_path())
    if saving.save_state and plan.every_epochs:
        states.append(plan.epoch_path(1))
    for path in states:
        yield from _try_to_make(plan.state_of(path), folder=True)
    yield from _of_wrong_kind(plan)


def _try_to_make(path: Path, *, folder: bool, option: str = "--output_name") -> Iterator[str]:
    """Makes a file or folder of this name, with its parents, and removes all of it again; a line if that fails.

    It is made within a temporary folder, so that a kill at this moment leaves nothing that looks like a result.
    """
    made: list[Path] = []
    try:
        _make_missing(path.parent, made)
        if os.path.lexists(path):
            return
        with work_folder(path) as place:
            probe = place / path.name
            probe.mkdir() if folder else probe.touch(exist_ok=False)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = getattr(error, "strerror", None) or error
        fits = len(path.name.encode("utf-8", "replace")) <= LONGEST_NAME
        shown = path if fits else f"{path.parent / path.name[:40]}..."
        yield f"{option}: {shown} cannot be made ({why}); choose another name"
    finally:
        for one in reversed(made):
            one.rmdir()


def _make_missing(folder: Path, made: list[Path]) -> None:
    if folder.is_dir():
        return
    if os.path.lexists(folder):
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is no folder")
    if not os.path.lexists(folder.parent) or not folder.parent.is_dir():
        _make_missing(folder.parent, made)
    folder.mkdir()
    made.append(folder)


def _of_wrong_kind(plan: SavePlan) -> Iterator[str]:
    """Lines about folders where files are to be written, and the other way round."""
    ends = {plan.final_path(): "", plan.epoch_path(0): "-000000", plan.step_path(0): "-step00000000"}
    name, epoch, step = (re.escape(path.name.removesuffix(end + plan.suffix)) for path, end in ends.items())
    copies = rf"({name}(-best)?|{epoch}-\d{{6}}|{step}-step\d{{8}})"
    kinds = (
        (re.compile(copies + re.escape(plan.suffix)), not plan.suffix, _MODEL_PARTS),
        (re.compile(rf"{copies}-state"), True, _STATE_PARTS),
    )
    try:
        entries = sorted(os.scandir(plan.final_path().parent), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        for pattern, is_folder, parts in kinds:
            if not pattern.fullmatch(entry.name):
                continue
            if entry.is_dir() != is_folder:
                wrong = "a file" if is_folder else "a folder"
            elif is_folder and os.listdir(entry.path) and not any(Path(entry.path, part).exists() for part in parts):
                wrong = "a folder of something else"
            else:
                continue
            yield f"--output_name: {entry.path} is {wrong}; move it, or choose another name"


def _smallest_copy(opts: Options) -> int:
    """The fewest bytes that a saved model takes, by the size of the file or folder that it comes from."""
    if not opts.method.trains_model:
        return _SMALLEST_NETWORK
    size = weights_size(opts.model.pretrained_model_name_or_path or "")
    return size // 2 if opts.saving.save_precision in ("fp16", "bf16") else size
