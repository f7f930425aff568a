"""Which images are kept out of training, to measure the loss on. An image is never on both sides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.sample.captions import CaptionOptions
from library.runtime.seeds import derive

if TYPE_CHECKING:
    from library.data.types import DatasetSpec, Record


def hold_out(
    records: Sequence[Record], specs: Sequence[DatasetSpec], seed: int, copies: Mapping[Path, Path]
) -> tuple[list[Record], list[Record]]:
    """(records to train on, records to validate with).

    Every dataset gives validation_split of its images, rounded, at least one; regularisation images none. A
    image that any dataset holds out leaves the training of all of them, and so do its exact copies. The choice
    depends on the seed and the images' names, so that it stays as it is when the folder moves or grows a little.

    Args:
        seed: used by datasets without a validation_seed.
        copies: image -> the first of the files with the same bytes; only those that have any.
    """

    def identity(record: Record) -> Path:
        return copies.get(record.path, record.path)

    held: set[Path] = set()
    for number, spec in enumerate(specs):
        if not spec.validation_split:
            continue
        own = {identity(record) for record in records if record.dataset == number and not record.subset.is_reg}
        chosen_by = seed if spec.validation_seed is None else spec.validation_seed
        order = sorted(own, key=lambda path: (derive(chosen_by, "held out", path.parent.name, path.name), path))
        held.update(order[: max(1, math.floor(len(own) * spec.validation_split + 0.5))])
    if not held:
        return list(records), []
    train, validation = [], []
    for record in records:
        if record.subset.is_reg or identity(record) not in held:
            train.append(record)
        elif specs[record.dataset].validation_split:
            validation.append(record)
    return train, _plain(validation)


def _plain(records: Sequence[Record]) -> list[Record]:
    """Held-out records, once each and without random augmentation, so that losses can be compared over time."""
    subsets: dict[int, object] = {}
    plain = []
    for record in records:
        key = id(record.subset)
        if key not in subsets:
            captions = record.subset.captions
            fixed = CaptionOptions(
                caption_separator=captions.caption_separator,
                keep_tokens_separator=captions.keep_tokens_separator,
                secondary_separator=captions.secondary_separator,
                enable_wildcard=captions.enable_wildcard,
                caption_prefix=captions.caption_prefix,
                caption_suffix=captions.caption_suffix,
            )
            subsets[key] = replace(
                record.subset,
                captions=fixed,
                flip_aug=False,
                color_aug=False,
                random_crop=False,
                face_crop_aug_range=None,
            )
        plain.append(replace(record, subset=subsets[key], repeats=1, flip=False))
    return plain
