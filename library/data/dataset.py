"""Records to samples to batches. An item's content depends on (seed, epoch, index) only, never on who computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from library.data import buckets, images, summary
from library.data.blueprint import DatasetSpec
from library.data.captions import make_caption
from library.data.records import Findings, Record, read_records
from library.data.sampler import Address, BatchLoader, make_loader
from library.errors import UserError
from library.runtime.seeds import derive
from library.types import Batch, Size

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from library.families.base import FamilyTraits
    from library.options.base import Options


@dataclass(frozen=True)
class Sample:
    """One item of a batch. Either `pixels` or `latents` is there."""

    caption: str
    pixels: Tensor | None  # (3, H, W) in [-1, 1]
    latents: Tensor | None  # (C, H/8, W/8)
    loss_weight: float
    original_size: Size
    crop_top_left: tuple[int, int]
    target_size: Size
    key: str


class CachedLatents(NamedTuple):
    """Latents of one record as they are and, with flip_aug, of its mirrored pixels; (C, H/8, W/8) on the CPU."""

    plain: Tensor
    flipped: Tensor | None


class ItemDataset(Dataset[Sample]):
    """Every record as often as it repeats. Small and picklable: this is what data workers hold."""

    def __init__(self, records: Sequence[Record], seed: int, prior_loss_weight: float, total_steps: int):
        self.records = records
        self.items = [number for number, record in enumerate(records) for _ in range(record.repeats)]
        self.seed = seed
        self.prior_loss_weight = prior_loss_weight
        self.total_steps = total_steps  # optimizer steps of the whole run; fractional token warm-up asks
        self.latents: list[CachedLatents] | None = None  # by record

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, address: Address) -> Sample:
        """Raises: UserError: the picture cannot be decoded."""
        number = self.items[address.index]
        record = self.records[number]
        look = Random(derive(self.seed, "picture", address.epoch, address.index))
        flip = record.subset.flip_aug and look.random() < 0.5
        pixels = latents = None
        if self.latents is None:
            pixels = images.to_pixels(render(record, flip, look))
        else:
            latents = self.latents[number].flipped if flip else self.latents[number].plain
        return Sample(
            caption=self._caption(record, address),
            pixels=pixels,
            latents=latents,
            loss_weight=self.prior_loss_weight if record.subset.is_reg else 1.0,
            original_size=record.size,
            crop_top_left=recorded_crop(record, flip),
            target_size=record.bucket,
            key=str(record.path),
        )

    def _caption(self, record: Record, address: Address) -> str:
        options = record.subset.captions.with_run_length(self.total_steps)
        words = Random(derive(self.seed, "caption", address.epoch, address.index))
        return make_caption(record.caption, options, words, address.epoch, address.step)


def render(record: Record, flip: bool, rng: Random) -> NDArray[Any]:
    """The picture as the model is to see it: uint8 (bucket height, bucket width, 3).

    Raises: UserError: the file cannot be read.
    """
    subset = record.subset
    try:
        image = images.read_image(record.path)
    except (OSError, ValueError) as error:
        raise UserError(f"{record.path}: the picture cannot be read ({error}); replace or remove it") from None
    if image.shape[1::-1] != record.size:
        raise UserError(f"{record.path}: the picture has changed since the start of the run")
    face = images.face_box(record.path) if subset.face_crop_aug_range and record.resized is None else None
    if face is not None:
        image = images.crop_face(
            image,
            face,
            record.bucket,
            subset.face_crop_aug_range,
            rng,
            anywhere=subset.random_crop,
            interpolation=subset.resize_interpolation,
        )
    else:
        image = images.resize(image, record.resized or record.size, subset.resize_interpolation)
        image = images.crop(image, record.bucket, rng if subset.random_crop else None)
    if subset.color_aug:
        image = images.vary_colours(image, rng)
    return image[:, ::-1] if flip else image


def recorded_crop(record: Record, flip: bool) -> tuple[int, int]:
    """(top, left) that SDXL is told; a mirrored picture counts from its other side. See `buckets.crop_ltrb`."""
    frame = record.size if record.resized is not None else record.bucket
    left, top, right, _ = buckets.crop_ltrb(record.bucket, frame)
    return int(top), int(record.bucket.width - right if flip else left)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one bucket to a batch."""

    def stack(tensors: list[Tensor | None]) -> Tensor | None:
        return None if tensors[0] is None else torch.stack(tensors)

    return Batch(
        captions=[sample.caption for sample in samples],
        latents=stack([sample.latents for sample in samples]),
        pixels=stack([sample.pixels for sample in samples]),
        loss_weights=torch.tensor([sample.loss_weight for sample in samples]),
        masks=None,
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
        crop_top_lefts=torch.tensor([sample.crop_top_left for sample in samples]),
        target_sizes=torch.tensor([sample.target_size for sample in samples]),
        keys=[sample.key for sample in samples],
    )


class TrainingData:
    """All datasets of a run: what is in them, the order of an epoch, and loaders over it."""

    def __init__(
        self, specs: Sequence[DatasetSpec], records: Sequence[Record], findings: Findings, opts: Options, seed: int
    ):
        self.specs, self.records, self.findings, self.opts, self.seed = specs, records, findings, opts, seed
        self.items = ItemDataset(records, seed, opts.loss.prior_loss_weight, opts.training.max_train_steps)
        self._groups = self._group_items()
        self._loader: tuple[Any, BatchLoader] | None = None  # kept where workers are persistent

    def _group_items(self) -> list[tuple[list[int], int]]:
        """(items, batch size) of every bucket of every dataset, in a stable order."""
        groups: dict[tuple[int, Size], list[int]] = {}
        for item, number in enumerate(self.items.items):
            record = self.records[number]
            groups.setdefault((record.dataset, record.bucket), []).append(item)
        return [(items, self.specs[dataset].batch_size) for (dataset, _), items in sorted(groups.items())]

    @property
    def num_train_images(self) -> int:
        """Pictures times repeats, without regularisation."""
        return sum(record.repeats for record in self.records if not record.subset.is_reg)

    @property
    def num_reg_images(self) -> int:
        """Regularisation pictures in use, times repeats."""
        return sum(record.repeats for record in self.records if record.subset.is_reg)

    @property
    def batches_per_epoch(self) -> int:
        """Over all processes."""
        return sum(-(-len(items) // batch_size) for items, batch_size in self._groups)

    def plan(self, epoch: int) -> list[list[int]]:
        """The item indices of every batch of an epoch (counted from 1), all processes together."""
        return buckets.plan_batches(self._groups, Random(derive(self.seed, "plan", epoch)))

    def set_total_steps(self, steps: int) -> None:
        """Optimizer steps of the whole run, once they are known; --max_train_steps holds until then."""
        self.items.total_steps = steps
        self._loader = None

    def set_latents(self, latents: list[CachedLatents]) -> None:
        """From now on items carry these latents, one entry per record, and no pixels."""
        self.items.latents = latents
        self._loader = None

    def loader(
        self, epoch: int, first_batch: int = 0, rank: int = 0, world: int = 1, workers: int | None = None
    ) -> BatchLoader:
        """Batches of one epoch for one process.

        Args:
            epoch: counted from 1.
            first_batch: how many of this process's batches to leave out, after resuming.
            rank, world: this process and how many there are. All get ceil(batches / world) batches; where they do not
                divide, the epoch's first batches come a second time.
            workers: worker processes at most; None: --max_data_loader_n_workers. Never more than CPU cores or
                batches, and none when latents are in memory, as there is nothing left to compute.
        """
        if workers is None:
            workers = self.opts.data.max_data_loader_n_workers
        workers = 0 if self.items.latents is not None else workers
        key = (rank, world, workers)
        if self._loader is None or self._loader[0] != key:
            accumulation = self.opts.training.gradient_accumulation_steps
            persistent = self.opts.data.persistent_data_loader_workers
            loader = make_loader(self, collate, rank, world, accumulation, workers, persistent)
            self._loader = (key, loader) if loader.persistent_workers else None
        else:
            loader = self._loader[1]
        loader.batches.start(epoch, first_batch)
        return loader

    def report(self) -> list[str]:
        """What was found, in lines for the log: pictures, buckets, and everything that is left out and why."""
        return summary.report(self)

    def metadata(self, processes: int = 1) -> dict[str, Any]:
        """The ss_* values that describe the data; structures that the format writes as JSON are JSON text."""
        return summary.metadata(self, processes)


def build_training_data(specs: Sequence[DatasetSpec], opts: Options, traits: FamilyTraits, seed: int) -> TrainingData:
    """Looks at every file and makes the data of a run, in any family's terms; `traits` will name its cache files.

    Raises: UserError: no usable picture, wrong sizes, unreadable captions.
    """
    records, findings = read_records(specs)
    return TrainingData(specs, records, findings, opts, seed)
