"""Looks at every picture and caption once, before training: sizes, captions, buckets, and what has to be left out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from library.data import buckets, images
from library.data.blueprint import DatasetSpec, SubsetSpec
from library.data.captions import caption_file, extension_in_use, read_caption
from library.data.folders import list_folder
from library.errors import UserError
from library.runtime.logs import LOGGER
from library.types import Size


@dataclass(frozen=True)
class Record:
    """One picture of one subset. The same file in another dataset is another record."""

    path: Path
    caption: str  # as the file says; see captions.make_caption
    size: Size  # of the picture on disk, upright
    bucket: Size  # what the model sees
    resized: Size | None  # covers the bucket; None: no buckets, cut out as it is
    subset: SubsetSpec
    dataset: int  # index of its DatasetSpec
    repeats: int


@dataclass
class Findings:
    """What the user should know about the files."""

    dropped: list[tuple[Path, str]] = field(default_factory=list)  # and why
    turned: int = 0  # by EXIF orientation
    uncaptioned: int = 0  # no caption file: class tokens, or nothing
    without_words: int = 0  # of these, no class tokens either
    empty_captions: int = 0
    surplus_reg: int = 0  # regularisation pictures that are not used
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Look:
    path: Path
    probe: images.Probe | None
    caption: str | None = None
    problem: str | None = None  # of the picture: it is dropped
    caption_problem: str | None = None  # stops the run


def read_records(specs: Sequence[DatasetSpec]) -> tuple[list[Record], Findings]:
    """Every usable picture in a stable order: by dataset, subset, file name.

    Raises: UserError: nothing is left, captions cannot be read, or pictures of the wrong size without buckets.
    """
    findings, records, problems = Findings(), [], []
    with ThreadPoolExecutor(max_workers=min(16, 4 * (os.cpu_count() or 1))) as pool:
        for number, spec in enumerate(specs):
            found = []
            for subset in spec.subsets:
                looks = _look_at(subset, pool, findings)
                problems += [look.caption_problem for look in looks if look.caption_problem]
                found += _usable(looks, subset, number, spec, findings, problems)
            records += balance_regularisation(found, findings)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    _check_what_is_left(records, specs, findings)
    return records, findings


def _look_at(subset: SubsetSpec, pool: ThreadPoolExecutor, findings: Findings) -> list[_Look]:
    paths, names = list_folder(subset.image_dir)
    extension = extension_in_use(subset.caption_extension, paths, names)
    if extension != subset.caption_extension:
        findings.warnings.append(
            f"{subset.image_dir}: no {subset.caption_extension} files; its {extension} files are used as captions "
            f"(set --caption_extension {extension} to say so)"
        )
    look = partial(_look, extension=extension, names=names, multiline=subset.captions.enable_wildcard)
    return list(pool.map(look, paths))


def _look(path: Path, extension: str, names: frozenset[str], multiline: bool) -> _Look:
    try:
        probe = images.probe(path)
    except (OSError, ValueError) as error:
        return _Look(path, None, problem=_reason(error))
    file = caption_file(path, extension, names)
    try:
        caption = None if file is None else read_caption(file, multiline=multiline)
    except UserError as error:
        return _Look(path, probe, caption_problem=error.problems[0])
    return _Look(path, probe, caption)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    name = type(error).__name__
    return "no picture that can be read" if name == "UnidentifiedImageError" else str(error) or name


def _usable(
    looks: Sequence[_Look],
    subset: SubsetSpec,
    number: int,
    spec: DatasetSpec,
    findings: Findings,
    problems: list[str],
) -> list[Record]:
    records, wrong_size = [], []
    sizes = _bucket_list(spec)
    for look in looks:
        if look.probe is None:
            findings.dropped.append((look.path, look.problem or "unreadable"))
            continue
        size = look.probe.size
        frame = _frame(look.path, size, subset, spec, sizes)
        if frame is None and not spec.enable_bucket:
            wrong_size.append((look.path, size))
        elif frame is None:
            findings.dropped.append((look.path, f"{size.width}x{size.height} is too small or too narrow for a bucket"))
        else:
            findings.turned += look.probe.turned
            caption = _caption(look, subset, findings)
            records.append(Record(look.path, caption, size, *frame, subset, number, subset.num_repeats))
    if wrong_size:
        path, size = wrong_size[0]
        wanted = f"{spec.resolution.width}x{spec.resolution.height}"
        problems.append(
            f"{subset.image_dir}: {len(wrong_size)} of {len(looks)} pictures do not have the size {wanted} "
            f"(the first is {path.name}, {size.width}x{size.height}); set enable_bucket, or resize them"
        )
    return records


def _bucket_list(spec: DatasetSpec) -> list[Size]:
    if not spec.enable_bucket or spec.bucket_no_upscale:
        return []
    return buckets.bucket_sizes(spec.resolution, spec.min_bucket_reso, spec.max_bucket_reso, spec.bucket_reso_steps)


def _frame(
    path: Path, size: Size, subset: SubsetSpec, spec: DatasetSpec, sizes: Sequence[Size]
) -> tuple[Size, Size | None] | None:
    """(bucket, resized) of a picture, or None where it does not fit."""
    if not spec.enable_bucket:
        covers = size.width >= spec.resolution.width and size.height >= spec.resolution.height
        may_be_cut = subset.random_crop or (subset.face_crop_aug_range and images.face_box(path))
        return (spec.resolution, None) if size == spec.resolution or (covers and may_be_cut) else None
    if spec.bucket_no_upscale:
        return buckets.choose_no_upscale(size, spec.resolution, spec.bucket_reso_steps)
    return buckets.choose(size, sizes)


def _caption(look: _Look, subset: SubsetSpec, findings: Findings) -> str:
    if look.caption is None:
        findings.uncaptioned += 1
        findings.without_words += subset.class_tokens is None
        return subset.class_tokens or ""
    findings.empty_captions += look.caption == ""
    return look.caption


def balance_regularisation(records: Sequence[Record], findings: Findings) -> list[Record]:
    """Evens out one dataset: regularisation pictures come until their repeats reach the training pictures'.

    If there are too few, their repeats grow by one, from the first on, until they reach it; surplus ones are left out.
    """
    train = [record for record in records if not record.subset.is_reg]
    regular = [record for record in records if record.subset.is_reg]
    wanted = sum(record.repeats for record in train)
    used: list[Record] = []
    count = 0
    for record in regular:
        if count >= wanted:
            break
        used.append(record)
        count += record.repeats
    findings.surplus_reg += len(regular) - len(used)
    more, rest = divmod(max(0, wanted - count), max(1, len(used)))
    return train + [
        replace(record, repeats=record.repeats + more + (position < rest)) for position, record in enumerate(used)
    ]


def _check_what_is_left(records: Sequence[Record], specs: Sequence[DatasetSpec], findings: Findings) -> None:
    empty = set(range(len(specs))) - {record.dataset for record in records if not record.subset.is_reg}
    if empty:
        folders = ", ".join(str(s.image_dir) for number in sorted(empty) for s in specs[number].subsets if not s.is_reg)
        reasons = [f"{path}: {why}" for path, why in findings.dropped[:10]]
        raise UserError(f"no usable training picture in {folders}", *reasons)
    if findings.without_words:
        findings.warnings.append(
            f"{findings.without_words} pictures have neither a caption file nor class tokens: they train on no text"
        )
    for line in findings.warnings:
        LOGGER.warning(line)
