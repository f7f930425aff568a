"""The one training loop. Families and methods plug into it; it never asks which one it has."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.errors import UserError
from library.runtime import durable, logs, seeds
from library.runtime.logs import LOGGER
from library.runtime.processes import Processes
from library.runtime.signals import Interruption
from library.training import placement, saving, state
from library.training.ema import Average
from library.training.lr_schedules import wants_loss
from library.training.optimizers import averaged_weights, effective_rates
from library.training.scalars import ScalarQueue, all_finite
from library.training.state_notes import MODEL, Progress
from library.training.step import StepParts, training_step
from library.training.validation import Best

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.data.dataset import TrainingData
    from library.families.base import Family
    from library.inference.preview import Preview
    from library.methods.base import Method
    from library.objectives.objective import Objective
    from library.options.base import Options
    from library.training.hub import Hub
    from library.training.plan import RunPlan, Start
    from library.training.resuming import Making
    from library.training.sharding import Shards
    from library.training.stepping import Stepper
    from library.training.tracking import Tracker
    from library.training.validation import Validation
    from library.types import Batch, Denoise, Models

_AGAINST_OVERFLOW = "a lower --learning_rate, --mixed_precision bf16 or no, or --no_half_vae usually helps"


@dataclass
class Run:
    """Everything a run consists of, built by `cli`."""

    opts: Options
    seed: int
    family: Family
    method: Method
    models: Models
    denoise: Denoise
    objective: Objective
    data: TrainingData
    plan: RunPlan
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    stepper: Stepper
    schedule: torch.optim.lr_scheduler.LRScheduler
    saves: saving.SavePlan
    preview: Preview
    validation: Validation
    tracker: Tracker
    hub: Hub
    make_metadata: Callable[[RunFacts], dict[str, str] | None]
    save_dtype: torch.dtype | None
    start: Start
    making: Making  # what a state says of this run
    resume: Path | None = None  # state folder
    average: Average | None = None  # of the trained weights
    shards: Shards | None = None  # where the trained weights are spread over the processes
    best: Best = field(default_factory=Best)

    @contextmanager
    def as_used(self) -> Iterator[None]:
        """Within the block the trained module is what is saved, sampled and validated."""
        self._settle()
        with averaged_weights(self.optimizer), nullcontext() if self.average is None else self.average.in_place():
            yield
            self._settle()

    def _settle(self) -> None:
        if self.shards is not None:  # weights gathered before know nothing of what changes now
            self.shards.settle()

    @property
    def writes(self) -> bool:
        """Whether this process is the one that saves and samples."""
        return self.accelerator.is_main_process

    @property
    def takes_part(self) -> bool:
        """Whether this process is needed for it: spread weights are gathered by all together."""
        return self.writes or self.shards is not None

    @property
    def processes(self) -> Processes:
        return Processes(self.accelerator.process_index, self.accelerator.num_processes)


@dataclass
class RunFacts:
    """How far the run is; what metadata, names and logs are made from."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # the epoch being trained, from 1
    micro_step: int = 0  # batches done by this process since the first epoch
    started: float = field(default_factory=time.time)
    epoch_ended: bool = False  # whether all that the epoch's end asks for is done, but for saving
    interrupted: bool = False  # by a signal
    stopped: bool = False  # early, because validation no longer improves


def train(run: Run) -> RunFacts:
    """Runs until the planned number of optimizer steps is done, saving, sampling and logging on the way.

    Ctrl-C and SIGTERM end it after the step at hand, with a state to go on from. In the last step they change nothing.
    """
    with Interruption() as interruption:
        facts = _steps(run, interruption)
        if run.takes_part:
            _save_interrupted(run, facts) if facts.interrupted else _save(run, facts, run.saves.final())
    return facts


def _steps(run: Run, interruption: Interruption) -> RunFacts:
    grad_text = bool(run.method.trained_text_encoders())
    parts = StepParts(run.family, run.models, run.denoise, run.objective, grad_text)
    placement.training_modes(run.models, run.method.trainable(), grad_text=grad_text)
    if run.resume is not None:
        state.load_state(run.resume, _state_parts(run), making=run.making, spread=run.shards is not None)
        LOGGER.info("resumed from %s after step %d", run.resume, run.start.step)
    facts = RunFacts(run.start.step, run.start.epochs, run.start.epochs * run.plan.batches_per_process)
    facts.micro_step += run.start.batches
    report = _Report(run)
    if run.takes_part and facts.step == 0 and run.preview.due(0):
        _sample(run, facts, epoch_end=False)
    first_batch = run.start.batches
    end_of_epoch_missing = first_batch == run.plan.batches_per_process
    while (facts.step < run.plan.total_steps or end_of_epoch_missing) and not facts.interrupted and not facts.stopped:
        facts.epoch += 1
        facts.epoch_ended = False
        run.method.start_epoch(facts.epoch)
        _epoch(run, parts, facts, report, interruption, first_batch)
        first_batch, end_of_epoch_missing = 0, False
    report.close(facts)
    return facts


def _epoch(
    run: Run, parts: StepParts, facts: RunFacts, report: _Report, interruption: Interruption, first_batch: int
) -> None:
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    plateau = run.schedule if wants_loss(run.schedule) else None
    for group in _groups_of(_batches(run, facts.epoch, first_batch), run.plan.accumulation):
        run.method.start_step(facts.step)
        run.stepper.start(facts.step)
        losses = _accumulate(run, parts, group, facts)
        if plateau is not None:
            plateau.see(losses)
        rates = effective_rates(run.optimizer) or run.schedule.get_last_lr()
        gradient_norm = _update(run, parameters)
        facts.step += 1
        if run.average is not None:
            run.average.update(facts.step)
        report.step(facts.step, losses, gradient_norm, rates)
        if run.validation.due(facts.step):
            _validate(run, parts, facts, report)
        if run.takes_part:
            _after_step(run, facts, report)
        # All processes must leave at the same step, whichever of them the signal has reached.
        asked = bool(run.processes.largest(int(interruption.asked)))
        over = facts.stopped or facts.step >= run.plan.total_steps
        facts.interrupted = asked and not over
        if asked or over:
            break
    whole = facts.micro_step == facts.epoch * run.plan.batches_per_process
    if facts.interrupted or (facts.stopped and not whole):
        return
    loss = None
    if run.validation.due(facts.step, facts.epoch) and not facts.stopped:
        # Once is enough: an equal loss would count against the patience.
        loss = run.best.latest if run.validation.due(facts.step) else _validate(run, parts, facts, report)
    if plateau is not None and (mean := plateau.epoch_mean()) is not None:
        mean = run.accelerator.reduce(mean, "mean")
        plateau.step(mean.item() if loss is None else loss)
    facts.epoch_ended = True
    if run.takes_part:
        _after_epoch(run, facts, report)


def _state_parts(run: Run) -> state.Parts:
    extra = {"best": run.best} if run.data.held_out is not None else {}
    if run.average is not None:
        extra["average"] = run.average
    return state.Parts(run.method.trainable(), run.optimizer, run.schedule, run.accelerator.scaler, extra)


def _batches(run: Run, epoch: int, first_batch: int) -> Iterator[Batch]:
    accelerator = run.accelerator
    loader = run.data.loader(epoch, first_batch, rank=accelerator.process_index, world=accelerator.num_processes)
    for batch in loader:
        yield batch.to(accelerator.device)


def _groups_of(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` batches; the last one of an epoch may be shorter."""
    while group := list(islice(batches, size)):
        yield group


def _accumulate(run: Run, parts: StepParts, group: list[Batch], facts: RunFacts) -> list[Tensor]:
    """Forward and backward over the batches of one optimizer step; the gradient is their mean."""
    losses = []
    for batch in group:
        # The number of the batch among those of all processes: two processes see what one sees that accumulates two.
        number = facts.micro_step * run.accelerator.num_processes + run.accelerator.process_index
        torch.manual_seed(seeds.derive(run.seed, "layers", number))  # dropout inside the modules
        run.method.before_batch(batch)
        rng = seeds.generator(run.accelerator.device, run.seed, "noise", number)
        with run.accelerator.autocast():
            loss = training_step(parts, batch, rng).losses.mean()
        run.accelerator.backward(loss / len(group))
        losses.append(loss.detach())
        facts.micro_step += 1
    return losses


def _update(run: Run, parameters: list[Tensor]) -> Tensor | None:
    """Averages gradients over the processes, clips, steps; returns the gradient norm before clipping."""
    if run.accelerator.num_processes > 1 and run.shards is None:  # spread ones are averaged as they arrive
        average_gradients(parameters, run.accelerator.num_processes)
    norm = None
    limit = run.opts.optimizer.max_grad_norm
    if limit and not run.stepper.inside_backward:
        norm = run.accelerator.clip_grad_norm_(parameters, limit)
        norm = norm if run.shards is None else norm.full_tensor()
    run.method.before_step()
    run.stepper.step()
    skipped = run.optimizer.step_was_skipped  # the fp16 scaler leaves out steps that overflowed
    if not skipped and not wants_loss(run.schedule):
        run.schedule.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.method.after_step()
    return norm


def average_gradients(parameters: list[Tensor], world: int) -> None:
    """Replaces every gradient by its mean over the processes, as one message per number format.

    Adapters are reached through hooks and not through one wrapped forward, so this is done by hand.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]  # some are stopped on the way
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch._utils._flatten_dense_tensors(gradients)
        torch.distributed.all_reduce(flat)
        flat /= world
        for gradient, mean in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
            gradient.copy_(mean)


# --- between the steps ------------------------------------------------------------------------------------------------


def _after_step(run: Run, facts: RunFacts, report: _Report) -> None:
    due = run.saves.after_step(facts.step)
    if due:
        report.drain(wait=True)
        _save(run, facts, due)
    if run.preview.due(facts.step):
        _sample(run, facts, epoch_end=False)


def _after_epoch(run: Run, facts: RunFacts, report: _Report) -> None:
    due = run.saves.after_epoch(facts.epoch, run.plan.epochs)
    if due:
        report.drain(wait=True)
        _save(run, facts, due)
    if run.preview.due(facts.step, facts.epoch):
        _sample(run, facts, epoch_end=True)


def _validate(run: Run, parts: StepParts, facts: RunFacts, report: _Report) -> float:
    trained = run.method.trainable()
    trained.eval()  # no dropout
    with run.as_used():
        losses = run.validation.losses(parts, run.accelerator)
    placement.training_modes(run.models, trained, grad_text=parts.grad_text)
    run.tracker.scalars(facts.step, losses)
    loss = losses["loss/validation"]
    LOGGER.info("validation loss %.5f at step %d", loss, facts.step)
    options = run.opts.validation
    if run.best.see(loss) and options.save_best_validation and run.takes_part:
        report.drain(wait=True)
        _save(run, facts, saving.Due(run.saves.best_path()))
    facts.stopped = options.early_stop_patience is not None and run.best.since >= options.early_stop_patience
    if facts.stopped:
        LOGGER.warning("stopping at step %d: %d validations brought nothing better", facts.step, run.best.since)
    return loss


def _save(run: Run, facts: RunFacts, due: saving.Due) -> None:
    """Raises: UserError: no room, no permission, or broken weights; what was saved before is whole."""
    _check_weights(run, facts)
    parts = _state_parts(run)
    needed = state.needed_bytes(parts) if due.state else state.size_of(parts.trained.state_dict())
    saving.check_space(due.path.parent, needed, "what is to be saved")
    paths = [due.path, *run.method.companions(due.path)]
    for path in paths:
        run.hub.settle(path)  # an earlier one of this name
    with run.as_used(), nullcontext() if run.shards is None else run.shards.whole(), saving.failing_clearly(due.path):
        if run.writes:
            run.method.save(due.path, run.save_dtype, run.make_metadata(facts))
    LOGGER.info("saved %s", due.path)
    for path in paths:
        run.hub.upload(path)
    _forget(run, due.obsolete)
    if due.state is not None:
        _save_state(run, facts, due.state)
        _forget(run, due.obsolete_state)


def _forget(run: Run, obsolete: Path | None) -> None:
    if obsolete is not None and run.writes:
        for path in (obsolete, *run.method.companions(obsolete)):
            run.hub.settle(path)
            durable.remove(path)


def _save_state(run: Run, facts: RunFacts, folder: Path) -> None:
    run.hub.settle(folder)
    with saving.failing_clearly(folder):
        progress = Progress(facts.step, facts.epoch, run.seed, facts.epoch_ended)
        how = {"made_with": run.making.to_json(), "gather": run.shards is not None, "write": run.writes}
        state.save_state(folder, _state_parts(run), progress, **how)
    LOGGER.info("saved the state in %s", folder)
    run.hub.upload_state(folder)


def _check_weights(run: Run, facts: RunFacts) -> None:
    """A loss tells of broken weights one step late, when they would have replaced the last good ones.

    Raises: UserError: trained weights hold infinities or no numbers at all.
    """
    finite = all_finite([weight for group in run.optimizer.param_groups for weight in group["params"]])
    if run.shards is not None:  # each process sees its share; all must leave together
        finite = not run.processes.largest(int(not finite))
    if not finite:
        raise UserError(
            f"the weights are no longer finite after step {facts.step}; they are not saved, and what was saved before "
            "is whole",
            hint=_AGAINST_OVERFLOW,
        )


def _save_interrupted(run: Run, facts: RunFacts) -> None:
    _check_weights(run, facts)
    folder = run.saves.state_of(run.saves.step_path(facts.step))
    _save_state(run, facts, folder)
    LOGGER.warning(
        "interrupted after step %d; --resume=%s goes on from there; %s", facts.step, folder, _usable(run, facts, folder)
    )


def _usable(run: Run, facts: RunFacts, folder: Path) -> str:
    """Where the model as it is now is to be had without training on."""
    averaged = run.average is not None or callable(getattr(run.optimizer.optimizer, "eval", None))
    if run.method.added() is not None and not averaged:
        return f"{folder / MODEL} can be used as it is, without metadata"
    return f"with --max_train_steps={facts.step} beside it, only {run.saves.final_path().name} of this step is written"


def _sample(run: Run, facts: RunFacts, *, epoch_end: bool) -> None:
    with run.as_used():
        images = run.preview.render(
            run.models,
            facts.step,
            facts.epoch if epoch_end else None,
            denoise=run.denoise,
            trained=run.method.trainable(),
            device=run.accelerator.device,
            write=run.writes,
        )
    for index, image in enumerate(images):
        LOGGER.info("sampled %s", image.path)
        run.tracker.image(facts.step, f"sample/{index:02d}", image.image, image.prompt.prompt)


class _Report:
    """The progress bar and the logged numbers; reads them off the device only once they have arrived."""

    def __init__(self, run: Run):
        self._run = run
        self._queue = ScalarQueue()
        quiet = not run.accelerator.is_main_process
        done = run.start.step
        self._bar = logs.progress(run.plan.total_steps, "steps", unit="step", disable=quiet, initial=done)
        self._rates: dict[int, dict[str, float]] = {}
        self._mean: float | None = None

    def step(self, step: int, losses: list[Tensor], gradient_norm: Tensor | None, rates: list[float]) -> None:
        values = {"loss/current": torch.stack(losses).mean()}
        if gradient_norm is not None:
            values["norm/gradient"] = gradient_norm
        self._queue.push(step, values)
        groups = zip(self._run.optimizer.param_groups, rates, strict=True)
        self._rates[step] = {f"lr/{group['name']}": rate for group, rate in groups}
        self._bar.update()
        self.drain()

    def drain(self, wait: bool = False) -> None:
        """Raises: UserError: a loss is not finite; nothing is saved from then on."""
        for step, values in self._queue.ready(wait):
            loss = values["loss/current"]
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss became {loss} at step {step}; training stopped and nothing was saved after it",
                    hint=_AGAINST_OVERFLOW,
                )
            self._mean = loss if self._mean is None else 0.98 * self._mean + 0.02 * loss
            self._run.tracker.scalars(step, {**values, "loss/average": self._mean, **self._rates.pop(step)})
            self._bar.set_postfix({"loss": f"{self._mean:.4f}"}, refresh=False)

    def close(self, facts: RunFacts) -> None:
        self.drain(wait=True)
        self._bar.close()
        seconds = time.time() - facts.started
        steps = facts.step - self._run.start.step
        LOGGER.info("%d steps in %s, %.2f steps/s", steps, _clock(seconds), steps / max(seconds, 1e-9))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
