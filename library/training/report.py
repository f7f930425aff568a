"""The status line of a run and the numbers it logs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.errors import UserError
from library.runtime.logs import LOGGER
from library.screen import counted
from library.training import device_memory
from library.training.pace import Slowdown, Stopwatch
from library.training.scalars import ScalarQueue
from library.training.status_line import Status, StatusLine
from library.training.tracking import MEMORY, PACE

if TYPE_CHECKING:
    from library.training.plan import Progress
    from library.training.run import Run
    from library.types import Batch

AGAINST_OVERFLOW = "a lower --learning_rate, --mixed_precision bf16 or no, or --no_half_vae usually helps"


class Report:
    """The status line and the logged numbers; reads them off the device only once they have arrived."""

    def __init__(self, run: Run):
        self._run = run
        self._queue = ScalarQueue()
        self._line = StatusLine(run.plan.total_steps, run.start.step, disable=not run.writes)
        self._stopwatch = Stopwatch()
        device = run.accelerator.device
        self._slowdown = Slowdown(device_memory.swapped_in, lambda: device_memory.free_share(device))
        self._others: dict[int, dict[str, float]] = {}  # numbers that wait for the losses of their step
        self._mean: float | None = None
        self._epoch, self._memory = 0, 0.0  # as they were logged last

    @property
    def average(self) -> float | None:
        """The average loss of training, of late; None: no loss has arrived yet."""
        return self._mean

    def batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of an epoch; how long the loop waits for them is measured."""
        return self._stopwatch.batches(batches)

    def step(self, progress: Progress, losses: list[Tensor], norm: Tensor | None, rates: list[float]) -> None:
        """Call after each step. Args: norm: the gradient's, before it was clipped."""
        values = {"loss/current": torch.stack(losses).mean()}
        if norm is not None:
            values["norm/gradient"] = norm
        self._queue.push(progress.step, values)
        taken = self._stopwatch.step()
        groups = zip(self._run.optimizer.param_groups, rates, strict=True)
        others = {f"lr/{group['name']}": rate for group, rate in groups}
        self._others[progress.step] = {**others, PACE: taken.whole, **self._changed(progress)}
        status = Status(progress.epoch, self._run.plan.epochs, taken.whole, self._mean, rates[0], self._memory or None)
        self._line.step(status)
        slow = self._slowdown.observe(taken)
        if slow is not None and self._run.writes:
            LOGGER.warning("%s", slow)
        self.drain()

    def _changed(self, progress: Progress) -> dict[str, float]:
        """The epoch and the peak of memory, where they are not as they were logged last."""
        found: dict[str, float] = {}
        memory = device_memory.peak_gb(self._run.accelerator.device) or 0.0
        if memory > 1.01 * self._memory:
            found[MEMORY] = self._memory = memory
        if progress.epoch != self._epoch:
            found["progress/epoch"] = self._epoch = progress.epoch
        return found

    def drain(self, wait: bool = False) -> None:
        """Raises: UserError: a loss is not finite; nothing is saved from then on."""
        for step, values in self._queue.ready(wait):
            loss = values["loss/current"]
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss became {loss} at step {step}; training stopped and nothing was saved after it",
                    hint=AGAINST_OVERFLOW,
                )
            self._mean = loss if self._mean is None else 0.98 * self._mean + 0.02 * loss
            self._run.tracker.scalars(step, {**values, "loss/average": self._mean, **self._others.pop(step)})

    def close(self, progress: Progress) -> None:
        self.drain(wait=True)
        self._line.close()
        seconds = time.time() - progress.started
        steps = progress.step - self._run.start.step
        hours, rest = divmod(int(seconds), 3600)
        clock = f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
        LOGGER.info("%s in %s, %.2f s/step", counted(steps, "step"), clock, seconds / max(steps, 1))
