"""A step whose fp16 gradients overflowed is left out by the scaler; the schedule waits for the next one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from library.options.optimizer import OptimizerOptions
from library.training import loop
from tests.builders.options import options_with


@pytest.mark.parametrize(("gradients", "taken"), [((1.0, 1.0), 2), ((float("inf"), 1.0), 1), ((1.0, float("nan")), 1)])
def test_the_schedule_counts_the_steps_that_are_taken(gradients, taken):
    accelerator = Accelerator(cpu=True)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    prepared = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    nothing = lambda: None  # noqa: E731
    run = SimpleNamespace(
        accelerator=accelerator,
        opts=options_with(OptimizerOptions, max_grad_norm=0.0),
        method=SimpleNamespace(before_step=nothing, after_step=nothing),
        stepper=SimpleNamespace(inside_backward=False, step=prepared.step),
        optimizer=prepared,
        schedule=schedule,
        shards=None,
    )
    for gradient in gradients:
        scaler.scale(gradient * weight.sum()).backward()
        loop._update(run, [weight])
        assert weight.grad is None
    assert schedule.last_epoch == taken
    assert schedule.get_last_lr() == [0.5**taken]
    assert weight.item() == -sum(0.5**step for step in range(taken))
