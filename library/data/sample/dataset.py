"""Records to samples to batches. An item's content depends on (seed, epoch, index) only, never on who computes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from library.data.report import summary
from library.data.sample import buckets, images
from library.data.sample.captions import make_caption
from library.data.sample.inpainting_masks import random_mask
from library.data.sample.rendering import BRIGHT, View, loss_mask, recorded_crop, render, render_control
from library.data.sample.sampler import BatchLoader, make_loader
from library.data.scan.index import FileIndex, collector_paused
from library.data.scan.records import read_records
from library.data.types import DatasetSpec, ItemKey, LatentEntry, Record, Sample, ScanReport, TextStore
from library.runtime.paths import cache_folder
from library.runtime.seeds import derive
from library.types import Batch, Size, TextCond

if TYPE_CHECKING:
    from library.options.base import Options
    from library.types import FamilyTraits


class ItemDataset(Dataset[Sample]):
    """Every record as often as it repeats. Small and picklable: this is what data workers hold."""

    def __init__(
        self,
        records: Sequence[Record],
        multipliers: Sequence[float],
        seed: int,
        prior_loss_weight: float,
        total_steps: int,
    ):
        self.records = records
        self.multipliers = multipliers  # strength of the network, by dataset
        self.items = [number for number, record in enumerate(records) for _ in range(record.repeats)]
        self.seed = seed
        self.prior_loss_weight = prior_loss_weight
        self.total_steps = total_steps  # optimizer steps of the whole run; fractional token warm-up asks
        self.latents: Sequence[LatentEntry] | None = None  # by record
        self.text: TextStore | None = None
        self.first_text = 0  # the first record's number in the store

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: ItemKey) -> Sample:
        """Raises: UserError: the image or its latents cannot be read."""
        number = self.items[key.index]
        record = self.records[number]
        flip, look = self._look(record, key)
        pixels = latents = inpainting_mask = None
        if self.latents is None or record.subset.inpainting:
            view = render(record, flip, look)
            pixels, mask, control = images.to_pixels(view.pixels), loss_mask(view), view.control
            inpainting_mask = self._inpainting_mask(record, view, key) if record.subset.inpainting else None
        else:
            control = render_control(record, flip)
        if self.latents is not None:
            latents, mask = self.latents[number].load(flip)
        return Sample(
            caption=self.caption_at(key),
            pixels=pixels,
            latents=latents,
            mask=mask,
            loss_weight=self.prior_loss_weight if record.subset.is_reg else 1.0,
            original_size=record.size,
            crop_top_left=recorded_crop(record, flip),
            target_size=record.bucket,
            key=str(record.path),
            network_multiplier=self.multipliers[record.dataset],
            attributes=record.subset.custom_attributes,
            timestep_offset=record.subset.timestep_offset,
            text=None if self.text is None else self.text.get(self.first_text + number),
            control=None if control is None else images.to_unit(control),
            inpainting_mask=inpainting_mask,
        )

    def _inpainting_mask(self, record: Record, view: View, key: ItemKey) -> Tensor:
        """See `Sample.inpainting_mask`: the record's own, or a random one, by the item's address."""
        if view.inpainting_mask is not None:
            inside = view.inpainting_mask >= BRIGHT
        else:
            inside = random_mask(record.bucket, derive(self.seed, "inpainting mask", key.epoch, key.index))
        return torch.from_numpy(inside.astype("float32", order="C"))[None]

    def caption_at(self, key: ItemKey) -> str:
        """The caption as it is drawn there."""
        record = self.records[self.items[key.index]]
        options = record.subset.captions.with_run_length(self.total_steps)
        words = Random(derive(self.seed, "caption", key.epoch, key.index))
        return make_caption(record.caption, options, words, key.epoch, key.step)

    def is_mirrored_at(self, key: ItemKey) -> bool:
        """Whether the image is mirrored there."""
        return self._look(self.records[self.items[key.index]], key)[0]

    def _look(self, record: Record, key: ItemKey) -> tuple[bool, Random]:
        """Whether it is mirrored, and what decides over the rest."""
        rng = Random(derive(self.seed, "picture", key.epoch, key.index))
        return record.flip and rng.random() < 0.5, rng


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one bucket of one dataset to a batch."""

    # (B, 1, H, W). Subsets with masks and without may meet in a batch; cached masks may be smaller than others.
    masks = [sample.mask for sample in samples if sample.mask is not None]
    if masks:
        shape = min((mask.shape for mask in masks), key=lambda shape: shape.numel())
        masks = [
            torch.ones(shape) if sample.mask is None else functional.adaptive_avg_pool2d(sample.mask, shape[-2:])
            for sample in samples
        ]

    offsets = [sample.timestep_offset for sample in samples]

    def stack(tensors: list[Tensor | None]) -> Tensor | None:
        return None if tensors[0] is None else torch.stack(tensors)

    return Batch(
        captions=[sample.caption for sample in samples],
        latents=stack([sample.latents for sample in samples]),
        pixels=stack([sample.pixels for sample in samples]),
        loss_weights=torch.tensor([sample.loss_weight for sample in samples]),
        masks=torch.stack(masks) if masks else None,
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
        crop_top_lefts=torch.tensor([sample.crop_top_left for sample in samples]),
        target_sizes=torch.tensor([sample.target_size for sample in samples]),
        keys=[sample.key for sample in samples],
        network_multiplier=samples[0].network_multiplier,
        attributes=[sample.attributes for sample in samples],
        timestep_offsets=torch.tensor(offsets) if any(offsets) else None,
        text=None if samples[0].text is None else TextCond.stack([sample.text for sample in samples]),
        control=stack([sample.control for sample in samples]),
        inpainting_masks=stack([sample.inpainting_mask for sample in samples]),
    )


class TrainingData:
    """All datasets of a run: what is in them, the order of an epoch, and loaders over it."""

    def __init__(
        self,
        specs: Sequence[DatasetSpec],
        records: Sequence[Record],
        scan: ScanReport,
        index: FileIndex,
        opts: Options,
        seed: int,
    ):
        self.specs, self.records, self.scan, self.index = specs, records, scan, index
        self.opts, self.seed = opts, seed
        self.held_out: TrainingData | None = None  # what validation looks at
        multipliers = [spec.network_multiplier for spec in specs]
        steps = opts.training.max_train_steps
        self.items = ItemDataset(records, multipliers, seed, opts.loss.prior_loss_weight, steps)
        self._in_memory = False
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
        """Images times repeats, without regularisation."""
        return sum(record.repeats for record in self.records if not record.subset.is_reg)

    @property
    def num_reg_images(self) -> int:
        """Regularisation images in use, times repeats."""
        return sum(record.repeats for record in self.records if record.subset.is_reg)

    @property
    def batches_per_epoch(self) -> int:
        """Over all processes."""
        return sum(-(-len(items) // batch_size) for items, batch_size in self._groups)

    def batch_shapes(self) -> set[tuple[int, Size]]:
        """(images, their size in pixels) of every batch of an epoch, the last ones of buckets included."""
        found: set[tuple[int, Size]] = set()
        for items, batch_size in self._groups:
            size = Size(*self.records[self.items.items[items[0]]].bucket)
            counts = {min(batch_size, len(items)), len(items) % batch_size or batch_size}
            found |= {(count, size) for count in counts}
        return found

    def plan(self, epoch: int) -> list[list[int]]:
        """The item indices of every batch of an epoch (counted from 1), all processes together."""
        return buckets.plan_batches(self._groups, Random(derive(self.seed, "plan", epoch)))

    def records_by_batch(self, epoch: int) -> list[list[Record]]:
        """The records of every batch of an epoch, in the order of `plan`."""
        return [[self.records[self.items.items[item]] for item in batch] for batch in self.plan(epoch)]

    def set_total_steps(self, steps: int) -> None:
        """Optimizer steps of the whole run, once they are known; --max_train_steps holds until then."""
        self.items.total_steps = steps
        self._loader = None

    def set_latents(self, entries: Sequence[LatentEntry], *, in_memory: bool) -> None:
        """Makes items carry these latents and no pixels: one entry per record, then per held-out record."""
        self.items.latents = entries[: len(self.records)]
        self._in_memory = in_memory
        self._loader = None
        if self.held_out is not None:
            self.held_out.set_latents(entries[len(self.records) :], in_memory=in_memory)

    def set_text(self, store: TextStore) -> None:
        """Makes items carry these text-encoder outputs: of every record, then of every held-out record."""
        self.items.text, self._loader = store, None
        if self.held_out is not None:
            self.held_out.set_text(store)
            self.held_out.items.first_text = len(self.records)

    @property
    def _reads_images(self) -> bool:
        """Whether images are read in every epoch even where their latents are cached."""
        return any(subset.inpainting for spec in self.specs for subset in spec.subsets)

    def is_prepared(self) -> bool:
        """Whether all of it comes from metadata files, and nothing varies the images: latents may lie beside them."""
        return all(
            subset.metadata_file and not (subset.color_aug or subset.random_crop or subset.face_crop_aug_range)
            for spec in self.specs
            for subset in spec.subsets
        )

    @property
    def all_records(self) -> list[Record]:
        """The records, then those held out."""
        return [*self.records, *(self.held_out.records if self.held_out is not None else ())]

    def sizes(self) -> dict[Size, str]:
        """The sizes of buckets, each with the words before it in a message."""
        return {Size(*record.bucket): "a bucket of" for record in self.all_records}

    def batch_sizes(self) -> list[int]:
        return sorted({spec.batch_size for spec in self.specs})

    def example(self) -> tuple[str, Size]:
        return self.records[0].caption, self.records[0].bucket

    def content(self) -> list[str]:
        """A line for each image, sorted; other lines are other data."""
        return sorted(f"{one.path.name}/{one.size}/{one.bucket}/{one.repeats}" for one in self.all_records)

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
                batches, and none where everything is in memory, as there is nothing left to compute.
        """
        if workers is None:
            workers = self.opts.data.max_data_loader_n_workers
        workers = 0 if self._in_memory and not self._reads_images else workers
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
        """The lines for the log: images, buckets, and everything that is left out, with the reason."""
        return summary.report(self)

    def findings(self) -> list[tuple[str, list[tuple[Path, str]]]]:
        return summary.findings(self)

    def metadata(self, processes: int = 1) -> dict[str, Any]:
        """The ss_* values that describe the data; structures that the format writes as JSON are JSON text."""
        return summary.metadata(self, processes)


def build_training_data(
    specs: Sequence[DatasetSpec], opts: Options, traits: FamilyTraits, seed: int, *, main: bool = True
) -> TrainingData:
    """Looks at every file and makes the data of a run, in any family's terms.

    Args:
        main: whether this process is the one that writes: the index, and metadata_cache.json where asked for.

    Raises: UserError: no usable image, wrong sizes, unreadable captions.
    """
    place = opts.data.data_index_dir
    index = FileIndex(Path(place).expanduser() if place else cache_folder() / "index")
    with collector_paused(), index.many_questions():
        records, held_out, scan = read_records(specs, index, seed, strict=opts.data.strict, main=main)
        if main:
            index.save()
        data = TrainingData(specs, records, scan, index, opts, seed)
        if held_out:
            data.held_out = TrainingData(specs, held_out, scan, index, opts, seed)
    return data
