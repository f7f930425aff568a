"""The progress bar of a run and the numbers it logs."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.errors import UserError
from library.runtime import logs
from library.runtime.logs import LOGGER
from library.training.scalars import ScalarQueue

if TYPE_CHECKING:
    from library.training.plan import Progress
    from library.training.run import Run

AGAINST_OVERFLOW = "a lower --learning_rate, --mixed_precision bf16 or no, or --no_half_vae usually helps"


class Report:
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
                    hint=AGAINST_OVERFLOW,
                )
            self._mean = loss if self._mean is None else 0.98 * self._mean + 0.02 * loss
            self._run.tracker.scalars(step, {**values, "loss/average": self._mean, **self._rates.pop(step)})
            self._bar.set_postfix({"loss": f"{self._mean:.4f}"}, refresh=False)

    def close(self, progress: Progress) -> None:
        self.drain(wait=True)
        self._bar.close()
        seconds = time.time() - progress.started
        steps = progress.step - self._run.start.step
        hours, rest = divmod(int(seconds), 3600)
        clock = f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
        LOGGER.info("%d steps in %s, %.2f steps/s", steps, clock, steps / max(seconds, 1e-9))
