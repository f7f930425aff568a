"""Which items come when: the batches of an epoch by (epoch, step, index), and loaders over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import DataLoader, Sampler

from library.data.scan.index import available_cores
from library.data.types import ItemKey
from library.errors import UserError
from library.runtime.signals import leave_interrupts_to_the_parent

if TYPE_CHECKING:
    from library.data.types import Sample
    from library.types import Batch


class EpochPlan(Protocol):
    """The part of the data of a run that a loader needs."""

    items: Any  # a data set of samples, by ItemKey
    seed: int

    @property
    def batches_per_epoch(self) -> int:
        """Over all processes."""

    def plan(self, epoch: int) -> list[list[int]]:
        """The item indices of every batch of an epoch (counted from 1), all processes together."""


class EpochBatches(Sampler[list[ItemKey]]):
    """The batches of one process in the epoch that `start` chose."""

    def __init__(self, data: EpochPlan, rank: int, world: int, accumulation: int):
        self.data, self.rank, self.world, self.accumulation = data, rank, world, accumulation
        self.per_process = math.ceil(data.batches_per_epoch / world)
        self.steps_per_epoch = math.ceil(self.per_process / accumulation)
        self.start(1, 0)

    def start(self, epoch: int, first_batch: int) -> None:
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return max(0, self.per_process - self.first_batch)

    def __iter__(self) -> Iterator[list[ItemKey]]:
        plan = self.data.plan(self.epoch)
        for batch in range(self.first_batch, self.per_process):
            step = (self.epoch - 1) * self.steps_per_epoch + batch // self.accumulation
            items = plan[(batch * self.world + self.rank) % len(plan)]
            yield [ItemKey(self.epoch, step, index) for index in items]


class BatchLoader(DataLoader):
    """A DataLoader whose workers hand user errors over as values, so that they arrive without a worker's traceback."""

    batches: EpochBatches

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


class _Guarded:
    """Picklable dataset that loads whole batches and returns a UserError in place of raising it."""

    def __init__(self, items: Any, collate: Callable[[list[Sample]], Batch]):
        self.items, self.collate = items, collate

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, keys: list[ItemKey]) -> Batch | UserError:
        try:
            return self.collate([self.items[key] for key in keys])
        except UserError as error:
            return error


def make_loader(
    data: EpochPlan,
    collate: Callable[[list[Sample]], Batch],
    rank: int,
    world: int,
    accumulation: int,
    workers: int,
    persistent: bool,
) -> BatchLoader:
    """A loader over `data`; `loader.batches.start` chooses the epoch."""
    batches = EpochBatches(data, rank, world, accumulation)
    workers = max(0, min(workers, available_cores(), batches.per_process))
    loader = BatchLoader(
        _Guarded(data.items, collate),
        batch_sampler=batches,
        collate_fn=_as_is,
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        worker_init_fn=leave_interrupts_to_the_parent,
        pin_memory=torch.cuda.is_available(),  # so that Batch.to does not wait
        # A DataLoader draws a seed for its workers; from a stream of its own, so that training's stream is untouched.
        generator=torch.Generator().manual_seed(data.seed),
    )
    loader.batches = batches
    return loader


def _as_is(batch: Any) -> Any:
    return batch
