"""Learning rate schedules by the names that command lines use, counted in optimizer steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.optimization import AdafactorSchedule, get_scheduler

from library.errors import UserError
from library.options.optimizer import (
    initial_rate,
    is_schedule_free,
    schedule_args,
    schedule_name,
    sets_own_rate,
)
from library.training.optimizers import construct, import_class

if TYPE_CHECKING:
    from library.options.optimizer import OptimizerOptions

_POLYNOMIAL_END = 1e-7
_LONG = 10**9  # steps, where it is not known yet how many there are


class PlateauSchedule(ReduceLROnPlateau):
    """Lowers the rate once the loss no longer falls; `patience` and `cooldown` count epochs.

    The loss of one batch says too little, so `step()` without one, after each optimizer step, does nothing. The losses
    of the epoch so far belong to the state, for a run may be resumed within it.
    """

    _sum: Tensor | None = None
    _count = 0

    def observe(self, losses: list[Tensor]) -> None:
        """Losses of batches, (), on any device; does not wait for them."""
        total = torch.stack(losses).sum()
        self._sum = total if self._sum is None else self._sum.to(total.device) + total
        self._count += len(losses)

    def epoch_mean(self) -> Tensor | None:
        """The mean of what was seen since the last call, (); None: nothing was."""
        mean = None if self._sum is None else self._sum / self._count
        self._sum, self._count = None, 0
        return mean

    def step(self, metrics: float | None = None, epoch: int | None = None) -> None:
        if metrics is not None:
            super().step(metrics)


class AdafactorRates(AdafactorSchedule):
    """Shows the rates that AdaFactor sets itself, of the first tensor of each group, as plain numbers."""

    def get_lr(self) -> list[float]:
        return [self._rate(group, base) for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True)]

    def _rate(self, group: dict[str, Any], before: float) -> float:
        state = self.optimizer.state.get(group["params"][0], {})
        # the step has compared the same values on the host already
        return float(self.optimizer._get_lr(group, state)) if "step" in state else before


def observe_losses(schedule: torch.optim.lr_scheduler.LRScheduler, losses: list[Tensor]) -> None:
    """Losses of the batches of a step, each (): what a schedule that follows the loss is stepped by."""
    if isinstance(schedule, PlateauSchedule):
        schedule.observe(losses)


def end_epoch(
    schedule: torch.optim.lr_scheduler.LRScheduler, validation_loss: float | None, mean: Callable[[Tensor], Tensor]
) -> None:
    """Steps a schedule that follows the loss; the others are stepped after each optimizer step.

    Args:
        validation_loss: of the epoch's end; None: the training loss of the epoch counts.
        mean: of a tensor over the processes, so that all of them step by the same number.
    """
    if isinstance(schedule, PlateauSchedule) and (loss := schedule.epoch_mean()) is not None:
        loss = mean(loss)
        schedule.step(loss.item() if validation_loss is None else validation_loss)


def wants_loss(schedule: torch.optim.lr_scheduler.LRScheduler) -> bool:
    """Whether the schedule follows the loss: `step(loss)` counts, `step()` does nothing."""
    return isinstance(schedule, PlateauSchedule)


def as_steps(value: int | float | None, total: int) -> int:
    """A whole number is steps; a fraction is that share of `total` (``--lr_warmup_steps 0.1`` or ``10%``)."""
    if value is None:
        return 0
    return value if isinstance(value, int) else int(value * total)


def make_schedule(
    optimizer: torch.optim.Optimizer, options: OptimizerOptions, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule over `total_steps` optimizer steps; `step()` comes after each.

    Raises: UserError: warm-up and decay take more steps than there are, or arguments do not fit.
    """
    if sets_own_rate(options):
        return AdafactorRates(optimizer, initial_rate(options))
    if is_schedule_free(options):
        return get_scheduler("constant", optimizer)
    arguments = schedule_args(options)
    if options.lr_scheduler_type:
        name = options.lr_scheduler_type
        path = name if "." in name else f"torch.optim.lr_scheduler.{name}"
        cls = import_class("--lr_scheduler_type", path, "torch.optim.lr_scheduler.LRScheduler")
        if cls is ReduceLROnPlateau:
            cls = PlateauSchedule
        elif issubclass(cls, ReduceLROnPlateau):
            raise UserError(f"--lr_scheduler_type: {name} needs a loss in every step; use reduce_lr_on_plateau")
        schedule = construct(cls, name, "--lr_scheduler_args", arguments, optimizer)
        limit = getattr(schedule, "total_steps", None)  # OneCycleLR fails in the step after
        if isinstance(limit, int) and limit < total_steps:
            raise UserError(f"--lr_scheduler_args: {name} ends after {limit} steps, the run has {total_steps}")
        return schedule
    name = schedule_name(options)
    if name == "reduce_lr_on_plateau":
        return construct(PlateauSchedule, name, "--lr_scheduler_args", arguments, optimizer)
    if name == "piecewise_constant":
        from diffusers.optimization import get_piecewise_constant_schedule

        return construct(get_piecewise_constant_schedule, name, "--lr_scheduler_args", arguments, optimizer)
    return _of_transformers(optimizer, options, total_steps, arguments)


def dry_run(options: OptimizerOptions, total_steps: int = _LONG) -> None:
    """Finds out, before anything large is read, whether the schedule takes its arguments, and fits into the run.

    Raises: UserError, as `make_schedule` does.
    """
    if sets_own_rate(options) or is_schedule_free(options):
        return
    weight = torch.nn.Parameter(torch.zeros(()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_schedule(
            torch.optim.SGD([weight], lr=abs(options.learning_rate) or 1.0, momentum=0.5), options, total_steps
        )


def _of_transformers(
    optimizer: torch.optim.Optimizer, options: OptimizerOptions, total_steps: int, arguments: dict[str, Any]
) -> torch.optim.lr_scheduler.LRScheduler:
    name = schedule_name(options)
    warmup = as_steps(options.lr_warmup_steps, total_steps)
    decay = as_steps(options.lr_decay_steps, total_steps)
    if warmup + decay > total_steps:
        raise UserError(
            f"--lr_warmup_steps ({warmup}) and --lr_decay_steps ({decay}) exceed the {total_steps} steps of the run"
        )
    specific: dict[str, Any] = {}
    cycles = options.lr_scheduler_num_cycles
    floor = options.lr_scheduler_min_lr_ratio or 0.0
    match name:
        case "constant":
            warmup = None
        case "cosine_with_restarts":
            specific = {"num_cycles": cycles}
        case "polynomial":
            end = _POLYNOMIAL_END if optimizer.defaults["lr"] > _POLYNOMIAL_END else 0.0
            specific = {"power": options.lr_scheduler_power, "lr_end": end}
        case "inverse_sqrt":
            specific = {"timescale": options.lr_scheduler_timescale}
        case "cosine_with_min_lr" | "cosine_warmup_with_min_lr":
            specific = {"num_cycles": cycles / 2}
            if "min_lr" not in arguments:
                specific["min_lr_rate"] = floor
        case "warmup_stable_decay":
            specific = {"num_cycles": cycles / 2, "num_decay_steps": decay, "min_lr_ratio": floor}
    specific |= arguments
    try:
        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=specific or None,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"--lr_scheduler_args: {name} refuses {specific}: {error}") from error
