"""Learning rate schedules by the names that command lines use, counted in optimizer steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library.errors import UserError

if TYPE_CHECKING:
    import torch

    from library.options.optimizer import OptimizerOptions


def as_steps(value: int | float | None, total: int) -> int:
    """A whole number is steps; a fraction is that share of `total` (``--lr_warmup_steps 0.1`` or ``10%``)."""
    if value is None:
        return 0
    return value if isinstance(value, int) else int(value * total)


def make_schedule(
    optimizer: torch.optim.Optimizer, options: OptimizerOptions, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule over `total_steps` optimizer steps.

    Raises: UserError: warm-up and decay take more steps than there are.
    """
    from transformers.optimization import get_scheduler

    name = options.lr_scheduler.lower()
    warmup = as_steps(options.lr_warmup_steps, total_steps)
    decay = as_steps(options.lr_decay_steps, total_steps)
    if warmup + decay > total_steps:
        raise UserError(
            f"--lr_warmup_steps ({warmup}) and --lr_decay_steps ({decay}) exceed the {total_steps} steps of the run"
        )
    specific: dict[str, Any] = {}
    cycles = options.lr_scheduler_num_cycles
    match name:
        case "constant":
            warmup = None
        case "cosine_with_restarts":
            specific = {"num_cycles": cycles}
        case "polynomial":
            specific = {"power": options.lr_scheduler_power}
        case "inverse_sqrt":
            specific = {"timescale": options.lr_scheduler_timescale}
        case "cosine_with_min_lr":
            specific = {"num_cycles": cycles / 2, "min_lr_rate": options.lr_scheduler_min_lr_ratio or 0.0}
        case "warmup_stable_decay":
            specific = {
                "num_cycles": cycles / 2,
                "num_decay_steps": decay,
                "min_lr_ratio": options.lr_scheduler_min_lr_ratio or 0.0,
            }
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=specific or None,
    )
