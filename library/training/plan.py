"""The arithmetic of a run: how images become batches, batches optimizer steps, and steps epochs. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

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


class ResumePoint(NamedTuple):
    """The point at which a run begins."""

    step: int = 0  # optimizer steps that count as done
    epochs: int = 0  # whole ones that count as done
    batches: int = 0  # that each process leaves out in the epoch after them


def start_at(plan: RunPlan, step: int, *, in_the_data: bool = True, epoch_ended: bool = True) -> ResumePoint:
    """The point after `step` optimizer steps; `in_the_data`: also inside the epoch, else at its beginning.

    Where the step is an epoch's last and that epoch has not `epoch_ended`, the run starts behind all of its batches,
    so that it is validated and saved as it would have been.
    """
    epochs, inside = divmod(step, plan.steps_per_epoch)
    if epochs and not inside and not epoch_ended:
        return ResumePoint(step, epochs - 1, plan.batches_per_process)
    return ResumePoint(step, epochs, min(inside * plan.accumulation, plan.batches_per_process) if in_the_data else 0)


def choose_start(
    plan: RunPlan, opts: TrainingOptions, saved_step: int | None, *, epoch_ended: bool = True
) -> ResumePoint:
    """The point that the options and the resumed state give.

    A state alone means exactly where it was saved. --initial_step and --initial_epoch win over it; they count only,
    unless --skip_until_initial_step asks for the place in the data too.
    """
    if opts.initial_step is not None:
        return start_at(plan, opts.initial_step, in_the_data=opts.skip_until_initial_step)
    if opts.initial_epoch is not None:
        return start_at(plan, (opts.initial_epoch - 1) * plan.steps_per_epoch)
    return start_at(plan, saved_step or 0, epoch_ended=epoch_ended)


def describe(plan: RunPlan, images: int, reg_images: int) -> list[str]:
    """The lines shown before the first step. `images` and `reg_images` count repeats."""
    lines = [
        f"images x repeats per epoch: {images}" + (f" + {reg_images} regularisation" if reg_images else ""),
        f"batches per epoch: {plan.batches_per_epoch}; processes: {plan.processes}; "
        f"gradient accumulation: {plan.accumulation}",
        f"optimizer steps per epoch: ceil(ceil({plan.batches_per_epoch} / {plan.processes}) / {plan.accumulation}) "
        f"= {plan.steps_per_epoch}",
        f"total: {plan.total_steps} optimizer steps, {plan.epochs} epochs",
    ]
    twice = plan.batches_per_process * plan.processes - plan.batches_per_epoch
    if twice:
        lines.append(f"{twice} batches of each epoch come twice, so that all {plan.processes} processes have as many")
    if plan.by_default:
        lines.append(
            f"the length of {plan.total_steps} steps is the default: "
            "--max_train_steps or --max_train_epochs chooses another"
        )
    return lines
