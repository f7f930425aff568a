"""The data of a planned run: its real images, sorted into its real batches, of which the largest are played."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library import encoding
from library.caching import text
from library.data.sample.dataset import collate
from library.data.types import ItemKey

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.caching.encode_missing import Encoder
    from library.data.sample.dataset import TrainingData
    from library.families.base import Family
    from library.methods.base import Method
    from library.options.base import Options
    from library.types import Batch, Models, TextCond


@dataclass(frozen=True)
class PlayedLatents:
    """The cached latents of a record, without values."""

    shape: tuple[int, ...]

    def load(self, flip: bool) -> tuple[Tensor, Tensor | None]:
        return torch.zeros(self.shape), None


@dataclass(frozen=True)
class PlayedTexts:
    """Cached text-encoder outputs: those of one caption, for all records."""

    rows: dict[str, Tensor]

    def get(self, number: int) -> dict[str, Tensor]:
        return self.rows


class PlayedData:
    """A run's data, to which the caches of a plan can be given without changing it. All else is the data's own."""

    def __init__(self, real: TrainingData):
        self._real = real
        self.items = copy.copy(real.items)
        self.held_out = None if real.held_out is None else PlayedData(real.held_out)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def set_latents(self, entries: Sequence[PlayedLatents], *, in_memory: bool) -> None:
        self.items.latents = entries[: len(self._real.records)]
        if self.held_out is not None:
            self.held_out.set_latents(entries[len(self._real.records) :], in_memory=in_memory)

    def set_text(self, store: PlayedTexts) -> None:
        self.items.text = store
        if self.held_out is not None:
            self.held_out.set_text(store)

    def batch_pixels(self) -> list[int]:
        """Pixels of each batch of an epoch: the images' together."""
        return [_pixels(self, batch) for batch in self._real.plan(1)]

    def largest_batch(self) -> Batch:
        """The batch with the most pixels. Raises: UserError: an image cannot be read."""
        chosen = max(self._real.plan(1), key=lambda batch: _pixels(self, batch))
        return collate([self.items[ItemKey(index, 1, 0)] for index in chosen])


def _pixels(data: PlayedData, batch: Sequence[int]) -> int:
    buckets = [data.items.records[data.items.items[index]].bucket for index in batch]
    return sum(width * height for width, height in buckets)


@dataclass
class PlayedCaches(encoding.Caches):
    """Encodes the largest batch that each cache would encode, and notes how large the caches become."""

    watch: Callable[[str], Any]  # opens a phase of that name
    bytes_in_files: dict[str, int] = field(default_factory=dict)  # by what is cached
    bytes_in_memory: dict[str, int] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)  # how many there would be, by the phase of the one

    def latents(
        self, opts: Options, family: Family, models: Models, data: PlayedData
    ) -> Callable[[Encoder], None] | None:
        if not opts.data.of_images:
            return None
        place = encoding.latent_place(opts, family.traits, data)
        if place is None:
            return None

        def fill(encoder: Encoder) -> None:
            records, stride = data.all_records, family.traits.latent_stride
            largest = max(records, key=lambda record: record.bucket[0] * record.bucket[1])
            width, height = largest.bucket
            alike = sum(record.bucket == largest.bucket for record in records)
            with self.watch("caching latents"), torch.no_grad():
                pixels = torch.zeros(min(encoder.batch_size, alike), 3, height, width)
                made = encoder.encode(pixels, [torch.Generator() for _ in pixels]).float().cpu()
                shapes = [(made.shape[1], r.bucket[1] // stride, r.bucket[0] // stride) for r in records]
                mirrored = [1 + record.flip for record in records]
                size = sum(
                    4 * times * shape[0] * shape[1] * shape[2] for times, shape in zip(mirrored, shapes, strict=True)
                )
                (self.bytes_in_files if place == "disk" else self.bytes_in_memory)["latents"] = size
                self.batches["caching latents"] = -(-sum(mirrored) // encoder.batch_size)
                del made, pixels
            data.set_latents([PlayedLatents(shape) for shape in shapes], in_memory=place == "memory")

        return fill

    def text(
        self, opts: Options, family: Family, method: Method, models: Models, data: PlayedData
    ) -> Callable[[Accelerator], None] | None:
        if not opts.data.of_images:
            return self._prompts(super().text(opts, family, method, models, data))
        if not encoding.caches_text(opts, family, method):
            return None

        def fill(accelerator: Accelerator) -> None:
            captions = list(dict.fromkeys(one.caption for one in text.requests_of(data.all_records)))
            encoder = encoding.text_encoder(opts, family, models, accelerator)
            with self.watch("caching text"), torch.no_grad():
                some = captions[: encoder.batch_size]
                cond: TextCond = encoder.encode(some).map(lambda tensor: tensor.detach().cpu().contiguous())
                rows = {name: tensor[0].clone() for name, tensor in cond.tensors.items()}
            self.batches["caching text"] = -(-len(captions) // encoder.batch_size)
            size = sum(row.nbytes for row in rows.values())
            if opts.text_cache.cache_text_encoder_outputs_to_disk:
                # NumPy has no bfloat16, so files hold float32
                wide = sum(row.numel() * max(row.element_size(), 4 * row.is_floating_point()) for row in rows.values())
                self.bytes_in_files["text encoder outputs"] = wide * len(data.all_records)
            else:
                self.bytes_in_memory["text encoder outputs"] = size * len(captions)
            data.set_text(PlayedTexts(rows))

        return fill

    def _prompts(self, encode: Callable[[Accelerator], None]) -> Callable[[Accelerator], None]:
        """The run's own encoding of its prompts, all at once in one phase."""

        def fill(accelerator: Accelerator) -> None:
            with self.watch("caching text"):
                encode(accelerator)
            self.batches["caching text"] = 1

        return fill
