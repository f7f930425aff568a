"""The arithmetic of a run: how pictures become batches, batches optimizer steps, and steps epochs. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RunPlan:
    """Counted in optimizer steps unless a name says otherwise."""

    batches_per_epoch: int  # over all processes
    processes: int
    accumulation: int
    total_steps: int
    by_default: bool  # nobody chose the length; it is the option's default

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


def describe(plan: RunPlan, images: int, reg_images: int) -> list[str]:
    """The lines shown before the first step. `images` and `reg_images` count repeats."""
    lines = [
        f"pictures x repeats per epoch: {images}" + (f" + {reg_images} regularisation" if reg_images else ""),
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
