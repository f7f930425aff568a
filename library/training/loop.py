"""The one training loop. Families and methods plug into it; it never asks which one it has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from library.runtime.limits import during, exhausted
from library.runtime.logs import LOGGER
from library.runtime.processes import Processes
from library.runtime.signals import Interruption
from library.training import checkpointing, lr_schedules, placement, saving, state
from library.training.ahead import batch_number, look_ahead, seeded
from library.training.optimizers import effective_rates
from library.training.plan import Progress
from library.training.report import Report
from library.training.run import Run
from library.training.step import StepParts, training_step
from library.training.tracking import Ending
from library.training.validation import averages
from library.types import Batch
from networks.layers.copies import weights_in


def train(run: Run) -> Progress:
    """Runs until the planned number of optimizer steps is done, saving, sampling and logging on the way.

    Ctrl-C and SIGTERM end it after the step at hand, with a state to resume from and a copy to use. In the last step
    they change nothing.
    """
    with Interruption() as interruption:
        grad_text = bool(run.method.trained_text_encoders())
        parts = StepParts(run.family, run.models, run.denoise, run.objective, grad_text, run.draw)
        placement.training_modes(run.models, run.method.trainable(), grad_text=grad_text)
        if run.resume is not None:
            saved, sharded = checkpointing.state_parts(run), run.shards is not None
            state.load_state(run.resume, saved, settings=run.settings, sharded=sharded)
            LOGGER.info("resumed from %s after step %d", run.resume, run.start.step)
        progress = replace(run.start, started=time.time())
        report = Report(run)
        if run.takes_part and progress.step == 0 and run.preview.due(0):
            _sample(run, progress, epoch_end=False)
        _find_base(run, parts, progress)
        first_batch = progress.micro_step - progress.epoch * run.plan.batches_per_process
        end_of_epoch_missing = first_batch == run.plan.batches_per_process
        while (
            (progress.step < run.plan.total_steps or end_of_epoch_missing)
            and not progress.interrupted
            and not progress.stopped
        ):
            progress.epoch += 1
            progress.epoch_ended = False
            run.method.start_epoch(progress.epoch)
            _epoch(run, parts, progress, report, interruption, first_batch)
            first_batch, end_of_epoch_missing = 0, False
        report.close(progress)
        if run.takes_part:
            if progress.interrupted:
                checkpointing.save_interrupted(run, progress)
            else:
                checkpointing.save(run, progress, run.saves.final())
        run.tracker.ended(_ending(progress))
    return progress


def _ending(progress: Progress) -> Ending:
    if progress.interrupted:
        return Ending("stopped", f"after step {progress.step}")
    return Ending("done", "early: validation no longer improved" if progress.stopped else "")


def _epoch(
    run: Run, parts: StepParts, progress: Progress, report: Report, interruption: Interruption, first_batch: int
) -> None:
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    loaded = report.batches(iter(run.data.loader(progress.epoch, first_batch, rank=rank, world=world)))
    batches = look_ahead(run, parts, loaded, progress.micro_step)
    while group := list(islice(batches, run.plan.accumulation)):  # the last one of an epoch may be shorter
        losses, gradient_norm, rates = optimizer_step(run, parts, group, progress)
        report.step(progress, losses, gradient_norm, rates)
        if run.validation.due(progress.step):
            _validate(run, parts, progress, report, "step")
        if run.takes_part:
            _save_and_sample(run, progress, report, epoch_end=False)
        # All processes must leave at the same step, whichever of them the signal has reached.
        requested = run.processes.all_max(interruption.requested)
        over = progress.stopped or progress.step >= run.plan.total_steps
        progress.interrupted = 0 if over else requested
        if requested or over:
            break
    whole = progress.micro_step == progress.epoch * run.plan.batches_per_process
    if progress.interrupted or (progress.stopped and not whole):
        return
    loss = None
    if run.validation.due(progress.step, progress.epoch) and not progress.stopped:
        # Once is enough: an equal loss would count against the patience.
        done = run.validation.due(progress.step)
        loss = run.comparison.latest if done else _validate(run, parts, progress, report, "epoch")
    lr_schedules.end_epoch(run.schedule, loss, partial(run.accelerator.reduce, reduction="mean"))
    progress.epoch_ended = True
    if run.takes_part:
        _save_and_sample(run, progress, report, epoch_end=True)


def optimizer_step(
    run: Run, parts: StepParts, group: list[Batch], progress: Progress
) -> tuple[list[Tensor], Tensor | None, list[float]]:
    """One optimizer step over the batches of `group`, which moves `progress` on.

    Returns: the loss of each batch, the gradient's norm before clipping where it is clipped, the rates of the step.
    """
    run.method.start_step(progress.step)
    run.stepper.start(progress.step)
    losses = _accumulate(run, parts, group, progress)
    lr_schedules.observe_losses(run.schedule, losses)
    rates = effective_rates(run.optimizer) or run.schedule.get_last_lr()
    with during(f"the optimizer's part of step {progress.step + 1}"):
        gradient_norm = _update(run, [p for group in run.optimizer.param_groups for p in group["params"]])
    progress.step += 1
    if run.ema is not None:
        run.ema.update(progress.step)
    return losses, gradient_norm, rates


def _accumulate(run: Run, parts: StepParts, group: list[Batch], progress: Progress) -> list[Tensor]:
    """Forward and backward over the batches of one optimizer step; the gradient is their mean."""
    losses = []
    for batch in group:
        batch = batch.to(run.accelerator.device)
        number, step = batch_number(run, progress.micro_step), progress.step + 1
        run.method.set_strength(batch.network_multiplier)
        rng = seeded(run, parts, number)
        with _computing(run, number):
            with during(f"the forward pass of step {step}"), run.accelerator.autocast():
                loss = training_step(parts, batch, rng).losses.mean()
            with during(f"the backward pass of step {step}"):
                run.accelerator.backward(loss / len(group))
        losses.append(loss.detach())
        progress.micro_step += 1
    return losses


@contextmanager
def _computing(run: Run, number: int) -> Iterator[None]:
    """A context for the passes of one batch, in which adapters' weights have the dtype of the computation."""
    added = run.method.added()
    with ExitStack() as stack:
        if run.modulation is not None:
            stack.enter_context(run.modulation.batch(number))
        if added is not None and not run.stepper.inside_backward:  # which needs each gradient as soon as it is there
            stack.enter_context(weights_in(added, placement.WEIGHT_DTYPES[run.opts.memory.mixed_precision]))
        yield


def _update(run: Run, parameters: list[Tensor]) -> Tensor | None:
    """Averages gradients over the processes, clips, steps; returns the gradient norm before clipping."""
    if run.accelerator.num_processes > 1 and run.shards is None:  # sharded ones are averaged as they arrive
        average_gradients(parameters, run.processes)
    norm = None
    limit = run.opts.optimizer.max_grad_norm
    if limit and not run.stepper.inside_backward:
        norm = run.accelerator.clip_grad_norm_(parameters, limit)
        norm = norm if run.shards is None else norm.full_tensor()
    run.method.before_step()
    run.stepper.step()
    if not run.optimizer.step_was_skipped:  # the fp16 scaler leaves out steps that overflowed
        run.schedule.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.method.after_step()
    return norm


def average_gradients(parameters: list[Tensor], processes: Processes) -> None:
    """Replaces every gradient by its mean over the processes, as one message per dtype.

    A weight without a gradient counts as one of zeros where another process has one. Where none has, it stays without:
    of zeros, an optimizer would make a step by its weight decay and its averages.

    Adapters are reached through hooks and not through one wrapped forward, so this is done by hand.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]  # some are stopped on the way
    reached = processes.any_of([parameter.grad is not None for parameter in parameters])
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in (parameter for parameter, has_gradient in zip(parameters, reached, strict=True) if has_gradient):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch._utils._flatten_dense_tensors(gradients)
        torch.distributed.all_reduce(flat)
        flat /= processes.world
        for gradient, mean in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
            gradient.copy_(mean)


def _save_and_sample(run: Run, progress: Progress, report: Report, *, epoch_end: bool) -> None:
    """What is due after a step, or at the end of an epoch."""
    saves, epoch = run.saves, progress.epoch
    due = saves.after_epoch(epoch, run.plan.epochs) if epoch_end else saves.after_step(progress.step)
    if due:
        report.drain(wait=True)
        with during(f"saving after step {progress.step}"):
            checkpointing.save(run, progress, due)
    if run.preview.due(progress.step, epoch if epoch_end else None):
        _sample(run, progress, epoch_end=epoch_end)


def _find_base(run: Run, parts: StepParts, progress: Progress) -> None:
    """Measures the validation loss before the first step, unless a state has brought that of the run's beginning."""
    validation, comparison = run.validation, run.comparison
    if not validation.wanted or progress.step >= run.plan.total_steps or comparison.points == validation.points.digest:
        return
    if run.resume is not None:
        before = "other images, timesteps or noise" if comparison.points else "no losses to compare with"
        LOGGER.warning("validation: the state has %s; the comparison begins again after step %d", before, progress.step)
    comparison.restart()
    losses = _measure(run, parts, progress)
    if losses is not None:
        _begin(run, losses, progress)


def _begin(run: Run, losses: Tensor, progress: Progress) -> None:
    points = run.validation.points
    run.comparison.begin(losses, points.digest)
    run.tracker.scalars(progress.step, run.validation.values(losses, losses))
    LOGGER.info(
        "validation before step %d: loss %.5f, the base of what follows; %d images at %d timesteps each",
        *(progress.step + 1, run.comparison.latest, points.images, points.per_image),
    )


def _measure(run: Run, parts: StepParts, progress: Progress) -> Tensor | None:
    """The validation losses, see `Validation.losses`; None: memory ran out."""
    trained = run.method.trainable()
    trained.eval()  # no dropout
    losses = None
    try:
        with run.as_used():
            losses = run.validation.losses(parts, run.accelerator, run.method.set_strength)
    except (MemoryError, RuntimeError) as error:
        memory = exhausted(error)
        if memory is None or run.accelerator.num_processes > 1:  # the others would wait for this one
            raise
        LOGGER.warning("no validation at step %d: not enough %s; training goes on", progress.step, memory)
    placement.training_modes(run.models, trained, grad_text=parts.grad_text)
    return losses


def _validate(
    run: Run, parts: StepParts, progress: Progress, report: Report, every: Literal["step", "epoch"]
) -> float | None:
    """The validation loss; None: memory ran out. The run may have to stop now, and a best copy is saved."""
    losses = _measure(run, parts, progress)
    if losses is None:
        return None
    comparison, options = run.comparison, run.opts.validation
    if comparison.base is None:  # memory ran out before
        _begin(run, losses, progress)
        return comparison.latest
    verdict = comparison.update(losses, run.validation.points.strata)
    run.tracker.scalars(progress.step, run.validation.values(losses, comparison.base))
    if report.average is not None:  # by the names that earlier trainers have
        run.tracker.scalars(progress.step, averages(comparison.latest, report.average, every))
    LOGGER.info("%s", run.validation.line(losses, comparison.base, verdict.change, progress.step))
    if verdict.lowest and options.save_best_validation and run.takes_part:
        report.drain(wait=True)
        checkpointing.save(run, progress, saving.SaveRequest(run.saves.best_path()))
    progress.stopped = options.early_stop_patience is not None and comparison.since >= options.early_stop_patience
    if progress.stopped:
        LOGGER.warning("stopping at step %d: %d validations without improvement", progress.step, comparison.since)
    return comparison.latest


def _sample(run: Run, progress: Progress, *, epoch_end: bool) -> None:
    with run.as_used():
        images = run.preview.render(
            run.models,
            progress.step,
            progress.epoch if epoch_end else None,
            denoise=run.denoise,
            trained=run.method.trainable(),
            device=run.accelerator.device,
            set_strength=run.method.set_strength,
            write=run.writes,
        )
    for index, image in enumerate(images):
        LOGGER.info("sampled %s", image.path)
        run.tracker.image(progress.step, f"sample/{index:02d}", image.image, image.prompt.prompt, image.path)
    run.tracker.flush()
