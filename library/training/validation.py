"""The loss on images that are not trained on, at the same timesteps and with the same noise each time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from library.runtime.logs import LOGGER
from library.training.paired import Difference, difference
from library.training.step import StepParts, encoded, step_losses
from library.types import NoiseDraw, repeated

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.data.sample.dataset import TrainingData
    from library.objectives.objective import Objective
    from library.options.base import Options
    from library.types import Batch


_ABOUT_VALIDATION = (
    *("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"),
    *("save_best_validation", "early_stop_patience"),
)
_TIMESTEPS, _RANGES = 1000, 4  # timesteps run from 0 to 999, whatever the family makes of them
LEAST_POINTS = 64  # at all images together: with fewer, the standard error would be too large to decide on
NAME = "loss/validation"


@dataclass(frozen=True)
class Points:
    """What is measured, L points: each at one image, with one timestep. Batches are those of the data's first epoch."""

    per_image: int
    batches: list[int]  # the images of each
    times: Tensor  # timesteps, (L,), int64
    strata: Tensor  # of each timestep, (L,), int64, ascending with it
    concepts: dict[str, Tensor]  # which points are at images of it, (L,), bool; empty where there is but one
    digest: str  # of images, timesteps and noise

    @property
    def images(self) -> int:
        return sum(self.batches)


class Validation:
    """Decides when to validate, and measures the losses.

    Args: data: what is held out; None: nothing.
    """

    def __init__(self, opts: Options, data: TrainingData | None, seed: int, objective: Objective):
        self._data, self._objective = data, objective
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

    @property
    def wanted(self) -> bool:
        """Whether there is anything to measure."""
        return self._data is not None

    def due(self, step: int, epoch: int | None = None) -> bool:
        """Whether to validate after this step or, with `epoch`, at the end of that epoch."""
        every = self._steps if epoch is None else self._epochs
        return self._data is not None and bool(every) and (step if epoch is None else epoch) % every == 0

    @cached_property
    def points(self) -> Points:
        batches = self._data.records_by_batch(1)[: self._most]
        records = [record for batch in batches for record in batch]
        times = self._objective.validation_timesteps(points_per_image(len(records)))
        names = [record.subset.concept for record in records for _ in times]
        different = list(dict.fromkeys(names))
        concepts = {name: torch.tensor([one == name for one in names]) for name in different}
        content = [self._seed, times, [[(one.path.name, *one.bucket) for one in batch] for batch in batches]]
        return Points(
            per_image=len(times),
            batches=[len(batch) for batch in batches],
            times=torch.tensor(times).repeat(len(records)),
            strata=torch.arange(len(times)).repeat(len(records)),
            concepts=concepts if len(different) > 1 else {},
            digest=hashlib.sha256(repr(content).encode("utf-8", "surrogatepass")).hexdigest(),
        )

    @torch.no_grad()
    def losses(self, parts: StepParts, accelerator: Accelerator, set_strength: Callable[[float], None]) -> Tensor:
        """The loss of every point, (L,), float64, on the CPU: image by image, in the order of timesteps.

        Every process computes its share; all get the same result, however many they are.
        """
        points, device = self.points, accelerator.device
        rank, world = accelerator.process_index, accelerator.num_processes
        times = self._objective.validation_timesteps(points.per_image)
        first = [sum(points.batches[:number]) for number in range(len(points.batches))]  # each batch's first image
        found = torch.zeros(points.images, len(times), device=device)
        loader = self._data.loader(1, rank=rank, world=world)
        for turn, batch in enumerate(islice(loader, math.ceil(len(points.batches) / world))):
            number = turn * world + rank  # among those of all processes
            batch = batch.to(device)
            set_strength(batch.network_multiplier)
            own = self._batch_losses(parts, accelerator, batch, number, times)
            if number < len(first):  # else another process has it too: sharded weights require all to take part
                found[first[number] : first[number] + len(own)] = own
        set_strength(1.0)
        return accelerator.reduce(found, "sum").flatten().double().cpu()

    def _batch_losses(
        self, parts: StepParts, accelerator: Accelerator, batch: Batch, number: int, times: list[int]
    ) -> Tensor:
        """(images, timesteps), float32. Latents and texts are encoded once; as many points at once as training has."""
        device, count, found = accelerator.device, len(batch.captions), []
        together = max(1, max(self._data.batch_sizes()) // count)
        with accelerator.autocast():
            own = parts.streams.at(device, self._seed, "validation", number)
            batch, latents, cond = encoded(parts, batch, own)
            for first in range(0, len(times), together):
                draws = []
                for place, time in enumerate(times[first : first + together], first):
                    rng = parts.streams.at(device, self._seed, "validation", number, place)
                    draws.append(self._objective.draw(latents, rng, torch.full((count,), time, device=device)))
                texts = cond.map(partial(repeated, times=len(draws)))
                losses = step_losses(parts, batch.repeated(len(draws)), texts, NoiseDraw.cat(draws))
                found.append(losses.float().view(len(draws), count))
        return torch.cat(found).T

    def values(self, now: Tensor, base: Tensor) -> dict[str, float]:
        """What is logged of a measurement, (L,), and of its difference from the base, by name."""
        points = self.points
        parts = {"": torch.ones(len(now), dtype=torch.bool)}
        for number in range(_RANGES):
            low, high = number * _TIMESTEPS // _RANGES, (number + 1) * _TIMESTEPS // _RANGES - 1
            parts[f" t {low:03d}-{high:03d}"] = (points.times >= low) & (points.times <= high)
        parts |= {f" of {name.replace('/', '_')}": own for name, own in points.concepts.items()}
        found = {}
        for name, own in parts.items():
            if own.any():
                change = difference(now[own], base[own], points.strata[own])
                found[f"{NAME}{name}"] = float(now[own].mean())
                found[f"{NAME}/base{name}"] = float(base[own].mean())
                found[f"{NAME}/difference{name}"] = change.mean
                if math.isfinite(change.error):
                    found[f"{NAME}/standard error{name}"] = change.error
        return found

    def line(self, now: Tensor, base: Tensor, from_best: Difference, step: int) -> str:
        """What the log says of a measurement, (L,), against the base and the best one so far."""
        mean = float(now.mean())
        from_base = _share(difference(now, base, self.points.strata), float(base.mean()))
        best = _share(from_best, mean - from_best.mean)
        return f"validation loss {mean:.5f} at step {step}: {from_base} from the base, {best} from the best so far"


def _share(change: Difference, before: float) -> str:
    """A difference and its standard error in percent of what was before."""
    if not before:
        return f"{change.mean:+.5f}"
    error = f" (standard error {100 * change.error / before:.2f} %)" if math.isfinite(change.error) else ""
    return f"{100 * change.mean / before:+.1f} %{error}"


def averages(loss: float, training: float, every: Literal["step", "epoch"]) -> dict[str, float]:
    """The validation loss, and how far it lies above that of training, by the names of earlier trainers."""
    return {f"{NAME}/{every}_average": loss, f"{NAME}/{every}_divergence": loss - training}


def points_per_image(images: int) -> int:
    """How many timesteps each image is looked at with: a multiple of four, so that every quarter has as many."""
    return _RANGES * max(1, math.ceil(LEAST_POINTS / images / _RANGES))
