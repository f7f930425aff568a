"""Looks at the next batches before their steps, for what can be computed for several of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.runtime import seeds
from library.training.step import StepParts, training_step

if TYPE_CHECKING:
    from library.training.run import Run
    from library.types import Batch


def batch_number(run: Run, micro_step: int) -> int:
    """The number of a batch among those of all processes: two processes see what one sees that accumulates two."""
    return micro_step * run.accelerator.num_processes + run.accelerator.process_index


def seeded(run: Run, parts: StepParts, number: int) -> torch.Generator:
    """Sets the randomness of a batch: that of torch inside the modules; returns that of noise and time."""
    torch.manual_seed(seeds.derive(run.seed, "layers", number))  # dropout inside the modules
    return parts.streams.at(run.accelerator.device, run.seed, "noise", number)


def look_ahead(run: Run, parts: StepParts, batches: Iterator[Batch], micro_step: int) -> Iterator[Batch]:
    """The same batches; where modulation is evicted, it is computed for several of them before the first is given.

    A batch's time, text and dropouts are drawn as its own step draws them, by its number, so that the step sees what it
    would see without. `micro_step`: that of the first batch.
    """
    if run.modulation is None:
        yield from batches
        return
    while group := list(islice(batches, run.opts.modulation.count)):
        with run.accelerator.autocast():
            numbers = [batch_number(run, micro_step + index) for index in range(len(group))]
            run.modulation.compute(
                {number: _embedded(run, parts, batch, number) for number, batch in zip(numbers, group, strict=True)}
            )
        micro_step += len(group)
        yield from group


def _embedded(run: Run, parts: StepParts, batch: Batch, number: int) -> Tensor:
    """What the denoiser embeds in the step of a batch. With gradients, as dropouts ask for them."""
    assert run.modulation is not None
    batch, rng = batch.to(run.accelerator.device), seeded(run, parts, number)
    return run.modulation.embed(lambda: training_step(parts, batch, rng))
