"""The loss on pictures that are not trained on, with the same noise and timesteps each time."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import torch

from library.runtime import seeds
from library.training.step import StepParts, training_step

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.data.dataset import TrainingData
    from library.options.base import Options


class Validation:
    """When to validate, and how."""

    def __init__(self, opts: Options, data: TrainingData | None, seed: int):
        self._data = data
        self._seed = seed if opts.validation.validation_seed is None else opts.validation.validation_seed
        self._steps, self._epochs = opts.validation.validate_every_n_steps, opts.validation.validate_every_n_epochs
        if self._steps is None and self._epochs is None:
            self._epochs = 1
        self._most = opts.validation.max_validation_steps

    def due(self, step: int, epoch: int | None = None) -> bool:
        """Whether to validate after this step or, with `epoch`, at the end of that epoch."""
        every = self._steps if epoch is None else self._epochs
        return self._data is not None and bool(every) and (step if epoch is None else epoch) % every == 0

    @torch.no_grad()
    def loss(self, parts: StepParts, accelerator: Accelerator) -> float:
        """The mean loss per picture. Every process computes its share; all get the same result."""
        rank, world = accelerator.process_index, accelerator.num_processes
        loader = self._data.loader(1, rank=rank, world=world)
        total = torch.zeros(2, dtype=torch.float32, device=accelerator.device)  # losses, pictures
        for number, batch in enumerate(islice(loader, self._most)):
            rng = seeds.generator(accelerator.device, self._seed, "validation", number * world + rank)
            with accelerator.autocast():
                losses = training_step(parts, batch.to(accelerator.device), rng)
            total += torch.stack([losses.sum(), torch.tensor(float(len(losses)), device=losses.device)])
        loss, pictures = accelerator.reduce(total, "sum").tolist()
        return loss / pictures
