"""What a run writes: copies of what is trained, states to resume from, and the removal of older ones."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.writing import bytes_of
from library.errors import UserError
from library.runtime import durable
from library.runtime.logs import LOGGER
from library.training import saving, state
from library.training.report import AGAINST_OVERFLOW
from library.training.scalars import all_finite

if TYPE_CHECKING:
    from library.training.plan import Progress
    from library.training.run import Run


def state_parts(run: Run) -> state.StateParts:
    """The parts of a state of the run."""
    extra = {"best": run.comparison} if run.data.held_out is not None else {}
    if run.ema is not None:
        extra["average"] = run.ema
    return state.StateParts(run.method.trainable(), run.optimizer, run.schedule, run.accelerator.scaler, extra)


def save(run: Run, progress: Progress, due: saving.SaveRequest) -> None:
    """Raises: UserError: no room, no permission, or broken weights; earlier files are intact."""
    _check_weights(run, progress)
    parts = state_parts(run)
    needed = state.needed_bytes(parts) if due.state else bytes_of(parts.trained.state_dict())
    saving.check_space(due.path.parent, needed, "what is to be saved")
    paths = [due.path, *run.method.companions(due.path)]
    for path in paths:
        run.hub.settle(path)  # an earlier one of this name
    with run.as_used(), nullcontext() if run.shards is None else run.shards.unshard(), saving.failing_clearly(due.path):
        if run.writes:
            run.method.save(due.path, run.save_dtype, run.make_metadata(progress))
    LOGGER.info("saved %s", due.path)
    for path in paths:
        run.hub.upload(path)
        run.tracker.saved(progress.step, path)
    _remove(run, due.obsolete)
    if due.state is not None:
        _save_state(run, progress, due.state)
        _remove(run, due.obsolete_state)


def _remove(run: Run, obsolete: Path | None) -> None:
    if obsolete is not None and run.writes:
        for path in (obsolete, *run.method.companions(obsolete)):
            run.hub.settle(path)
            durable.remove(path)


def _save_state(run: Run, progress: Progress, folder: Path) -> None:
    run.hub.settle(folder)
    with saving.failing_clearly(folder):
        how = {"settings": run.settings.to_json(), "gather": run.shards is not None, "write": run.writes}
        state.save_state(folder, state_parts(run), progress, run.seed, **how)
    LOGGER.info("saved the state in %s", folder)
    run.hub.upload_state(folder)
    run.tracker.saved(progress.step, folder)


def _check_weights(run: Run, progress: Progress) -> None:
    """Keeps broken weights from replacing the last good ones: a loss shows them one step late.

    Raises: UserError: trained weights are infinite or NaN.
    """
    finite = all_finite([weight for group in run.optimizer.param_groups for weight in group["params"]])
    if run.shards is not None:  # each process sees its share; all must leave together
        finite = not run.processes.all_max(int(not finite))
    if not finite:
        raise UserError(
            f"the weights are no longer finite after step {progress.step}; they are not saved, and what was saved "
            "before is whole",
            hint=AGAINST_OVERFLOW,
        )


def save_interrupted(run: Run, progress: Progress) -> None:
    """A state to resume from and a copy to use, unless both have just been saved. Raises: UserError."""
    path = run.saves.step_path(progress.step)
    folder, saved = run.saves.state_of(path), run.saves.after_step(progress.step)
    if saved is None or saved.state is None:
        _check_weights(run, progress)
        _save_state(run, progress, folder)
    usable = f"{path} can be used as it is"
    try:
        if saved is None:
            save(run, progress, saving.SaveRequest(path))
    except UserError as error:  # most likely there is no room beside the state, which matters more
        final = run.saves.final_path().name
        usable = f"no copy to use was saved ({error}): with --max_train_steps={progress.step} beside it, {final} is"
    LOGGER.warning("interrupted after step %d; %s; --resume=%s continues from there", progress.step, usable, folder)
