"""What a run is about, in a few lines before its first step: seed, rates, length, batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.options.optimizer import sets_own_rate
from library.screen import counted
from library.training.optimizers import describe_optimizer

if TYPE_CHECKING:
    import torch

    from library.options.base import Options
    from library.options.optimizer import OptimizerOptions
    from library.training.plan import RunPlan


def describe_run(
    opts: Options, optimizer: torch.optim.Optimizer, plan: RunPlan, batch_sizes: Sequence[int]
) -> list[tuple[str, str]]:
    """(name, text) of each line. `optimizer` has its schedule already. `batch_sizes` are those of single batches."""
    options, steps = opts.optimizer, plan.total_steps
    numbers = (weight.numel() for group in optimizer.param_groups for weight in group["params"])
    batch = " or ".join(map(str, batch_sizes))
    times = [(plan.accumulation, "accumulated"), (plan.processes, "processes")]
    more = "".join(f" x {count} {what}" for count, what in times if count > 1)
    if more and len(batch_sizes) == 1:
        more += f" = {batch_sizes[0] * plan.accumulation * plan.processes} images a step"
    return [
        ("seed", str(opts.training.seed)),
        ("trained", f"{in_millions(sum(numbers))} parameters"),
        ("rates", "computed by AdaFactor in each step" if sets_own_rate(options) else _rates(options, optimizer)),
        ("optimizer", describe_optimizer(optimizer, options)),
        ("length", f"{counted(steps, 'step')}, {counted(plan.epochs, 'epoch')} of {plan.steps_per_epoch}"),
        ("batch", f"{batch}{more}"),
    ]


def _rates(options: OptimizerOptions, optimizer: torch.optim.Optimizer) -> str:
    rates = [f"{group['name']} {group.get('initial_lr', group['lr']):.3g}" for group in optimizer.param_groups]
    schedule = options.lr_scheduler_type or options.lr_scheduler
    warmup = f" after a warm-up of {_steps(options.lr_warmup_steps)}" if options.lr_warmup_steps else ""
    return f"{', '.join(dict.fromkeys(rates))}; {schedule}{warmup}"


def _steps(given: float) -> str:
    return counted(given, "step") if isinstance(given, int) else f"{100 * given:g} % of the run"


def in_millions(count: int) -> str:
    """ "1.05 million", "11.9 billion"; below a million all digits."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"
