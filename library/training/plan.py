"""The arithmetic of a run: how images become batches, batches optimizer steps, and steps epochs. No torch here."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from library.screen import counted

if TYPE_CHECKING:
    from library.options.training import TrainingOptions


@dataclass(frozen=True)
class RunPlan:
    """Counted in optimizer steps unless a name says otherwise."""

    batches_per_epoch: int  # over all processes
    processes: int
    accumulation: int
    total_steps: int
    by_default: bool  # the length was not given; it is the option's default

    @property
    def batches_per_process(self) -> int:
        return math.ceil(self.batches_per_epoch / self.processes)

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may hold fewer batches than the others; no batch is left out."""
        return math.ceil(self.batches_per_process / self.accumulation)

    @property
    def epochs(self) -> int:
        return math.ceil(self.total_steps / self.steps_per_epoch)


def make_plan(
    batches_per_epoch: int, processes: int, accumulation: int, *, steps: int, epochs: int | None, by_default: bool
) -> RunPlan:
    """`epochs`, where given, decides the length; otherwise `steps` does."""
    plan = RunPlan(batches_per_epoch, processes, accumulation, steps, by_default and epochs is None)
    if epochs is None:
        return plan
    return RunPlan(batches_per_epoch, processes, accumulation, plan.steps_per_epoch * epochs, False)


@dataclass
class Progress:
    """The progress of a run, from which metadata, names and logs are made; states keep step, epoch and epoch_ended."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # the epoch being trained, from 1; before a run's first step, the number of epochs that are over
    micro_step: int = 0  # batches done by this process since the first epoch
    epoch_ended: bool = True  # False: what happens at the epoch's end is still to be done, if the epoch is over
    started: float = field(default_factory=time.time, compare=False)  # unix time
    interrupted: int = 0  # the number of the signal that ends the run early
    stopped: bool = False  # early, because validation no longer improves


def start_at(plan: RunPlan, step: int, *, in_the_data: bool = True, epoch_ended: bool = True) -> Progress:
    """The progress after `step` optimizer steps; `in_the_data`: also inside the epoch, else at its beginning.

    Where the step is an epoch's last and that epoch has not `epoch_ended`, the run starts behind all of its batches,
    so that it is validated and saved as it would have been.
    """
    epochs, inside = divmod(step, plan.steps_per_epoch)
    if epochs and not inside and not epoch_ended:
        return Progress(step, epochs - 1, epochs * plan.batches_per_process)
    batches = min(inside * plan.accumulation, plan.batches_per_process) if in_the_data else 0
    return Progress(step, epochs, epochs * plan.batches_per_process + batches)


def choose_start(plan: RunPlan, opts: TrainingOptions, saved: Progress | None) -> Progress:
    """The progress with which a run begins, by the options and the resumed state.

    A state alone means exactly where it was saved. --initial_step and --initial_epoch win over it; they count only,
    unless --skip_until_initial_step asks for the place in the data too.
    """
    if opts.initial_step is not None:
        return start_at(plan, opts.initial_step, in_the_data=opts.skip_until_initial_step)
    if opts.initial_epoch is not None:
        return start_at(plan, (opts.initial_epoch - 1) * plan.steps_per_epoch)
    return start_at(plan, 0) if saved is None else start_at(plan, saved.step, epoch_ended=saved.epoch_ended)


def describe(plan: RunPlan, images: int, reg_images: int) -> list[str]:
    """The lines shown before the first step. `images` and `reg_images` count repeats; 0: nothing is said of them."""
    regular = f" + {reg_images} regularisation" if reg_images else ""
    lines = [
        *([f"images x repeats per epoch: {images}{regular}"] if images else []),
        f"{counted(plan.steps_per_epoch, 'step')} per epoch ({counted(plan.batches_per_epoch, 'batch', 'batches')} / "
        f"{counted(plan.processes, 'process', 'processes')} / {plan.accumulation} accumulated)",
        f"total: {counted(plan.total_steps, 'optimizer step')}, {counted(plan.epochs, 'epoch')}",
    ]
    twice = plan.batches_per_process * plan.processes - plan.batches_per_epoch
    if twice:
        come = "batch of each epoch comes" if twice == 1 else "batches of each epoch come"
        lines.append(f"{twice} {come} twice, so that all {plan.processes} processes have as many")
    if plan.by_default:
        lines.append(
            f"the length of {plan.total_steps} steps is the default: "
            "--max_train_steps or --max_train_epochs chooses another"
        )
    return lines
