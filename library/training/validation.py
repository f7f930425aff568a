"""The loss on images that are not trained on, with the same noise and timesteps each time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING

import torch

from library.runtime.logs import LOGGER
from library.training.step import StepParts, training_step

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.data.sample.dataset import TrainingData
    from library.options.base import Options


_ABOUT_VALIDATION = (
    *("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"),
    *("save_best_validation", "early_stop_patience"),
)
_TIMESTEPS, _RANGES = 1000, 4  # timesteps run from 0 to 999, whatever the family makes of them


class Validation:
    """Decides when to validate, and computes the validation loss."""

    def __init__(self, opts: Options, data: TrainingData | None, seed: int):
        self._data = data
        self._seed = seed if opts.validation.validation_seed is None else opts.validation.validation_seed
        self._steps, self._epochs = opts.validation.validate_every_n_steps, opts.validation.validate_every_n_epochs
        if self._steps is None and self._epochs is None:
            self._epochs = 1
        self._most = opts.validation.max_validation_steps
        given = [f"--{name}" for name in _ABOUT_VALIDATION if name in opts.explicit and getattr(opts.validation, name)]
        if given and data is None:
            LOGGER.warning(
                "%s: has no effect, no images are kept for validation; --validation_split keeps some", ", ".join(given)
            )

    def due(self, step: int, epoch: int | None = None) -> bool:
        """Whether to validate after this step or, with `epoch`, at the end of that epoch."""
        every = self._steps if epoch is None else self._epochs
        return self._data is not None and bool(every) and (step if epoch is None else epoch) % every == 0

    @torch.no_grad()
    def losses(self, parts: StepParts, accelerator: Accelerator) -> dict[str, float]:
        """The mean loss per image, of all and by range of timesteps, by the names they are logged under.

        Every process computes its share; all get the same result, however many they are.
        """
        rank, world = accelerator.process_index, accelerator.num_processes
        loader = self._data.loader(1, rank=rank, world=world)
        count = self._data.batches_per_epoch if self._most is None else min(self._data.batches_per_epoch, self._most)
        sums = torch.zeros(2, _RANGES, device=accelerator.device)  # losses, images; by range
        for turn, batch in enumerate(islice(loader, math.ceil(count / world))):
            number = turn * world + rank  # among those of all processes
            rng = parts.streams.at(accelerator.device, self._seed, "validation", number)
            with accelerator.autocast():
                losses, timesteps = training_step(parts, batch.to(accelerator.device), rng)
            if number >= count:  # another process has it too: this one only took part, as sharded weights require
                continue
            place = (timesteps.float() * _RANGES / _TIMESTEPS).long().clamp(0, _RANGES - 1)
            sums[0].index_add_(0, place, losses.float())
            sums[1].index_add_(0, place, torch.ones_like(losses, dtype=torch.float32))
        loss, images = accelerator.reduce(sums, "sum").cpu()
        found = {"loss/validation": float(loss.sum() / images.sum())}
        for number in range(_RANGES):
            if images[number]:
                low, high = number * _TIMESTEPS // _RANGES, (number + 1) * _TIMESTEPS // _RANGES - 1
                found[f"loss/validation t {low:03d}-{high:03d}"] = float(loss[number] / images[number])
        return found


class BestLoss:
    """The lowest validation loss, how long ago it was, and the latest one."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.lowest = self.latest = math.inf
        self.since = 0  # validations without a better one

    def update(self, loss: float) -> bool:
        """Whether this is the best loss so far."""
        better = loss < self.lowest
        self.latest = loss
        self.lowest, self.since = (loss, 0) if better else (self.lowest, self.since + 1)
        return better

    def state_dict(self) -> dict[str, float]:
        return {"lowest": self.lowest, "latest": self.latest, "since": self.since}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.lowest, self.since = state["lowest"], int(state["since"])
        self.latest = state.get("latest", math.inf)
