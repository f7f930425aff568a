"""The loss on pictures that are not trained on, with the same noise and timesteps each time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING

import torch

from library.runtime import seeds
from library.training.step import StepParts, training_step

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.data.dataset import TrainingData
    from library.options.base import Options


_TIMESTEPS, _RANGES = 1000, 4  # timesteps run from 0 to 999, whatever the family makes of them


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
    def losses(self, parts: StepParts, accelerator: Accelerator) -> dict[str, float]:
        """The mean loss per picture, of all and by range of timesteps, by the names they are logged under.

        Every process computes its share; all get the same result.
        """
        rank, world = accelerator.process_index, accelerator.num_processes
        loader = self._data.loader(1, rank=rank, world=world)
        sums = torch.zeros(2, _RANGES, device=accelerator.device)  # losses, pictures; by range
        for number, batch in enumerate(islice(loader, self._most)):
            rng = seeds.generator(accelerator.device, self._seed, "validation", number * world + rank)
            with accelerator.autocast():
                losses, timesteps = training_step(parts, batch.to(accelerator.device), rng)
            place = (timesteps.float() * _RANGES / _TIMESTEPS).long().clamp(0, _RANGES - 1)
            sums[0].index_add_(0, place, losses.float())
            sums[1].index_add_(0, place, torch.ones_like(losses, dtype=torch.float32))
        loss, pictures = accelerator.reduce(sums, "sum").cpu()
        found = {"loss/validation": float(loss.sum() / pictures.sum())}
        for number in range(_RANGES):
            if pictures[number]:
                low, high = number * _TIMESTEPS // _RANGES, (number + 1) * _TIMESTEPS // _RANGES - 1
                found[f"loss/validation t {low:03d}-{high:03d}"] = float(loss[number] / pictures[number])
        return found


class Best:
    """The lowest validation loss, and how long ago it was."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.lowest = math.inf
        self.since = 0  # validations without a better one

    def see(self, loss: float) -> bool:
        """Whether this is the best loss so far."""
        better = loss < self.lowest
        self.lowest, self.since = (loss, 0) if better else (self.lowest, self.since + 1)
        return better

    def state_dict(self) -> dict[str, float]:
        return {"lowest": self.lowest, "since": self.since}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.lowest, self.since = state["lowest"], int(state["since"])
