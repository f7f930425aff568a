"""Reads every image's size and caption once, before training; assigns buckets, and leaves out unusable images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import NamedTuple

from library.data.sample import buckets, images
from library.data.sample.buckets import Fit
from library.data.scan import info_cache, near_duplicates
from library.data.scan.holdout import hold_out
from library.data.scan.index import FileIndex
from library.data.scan.sources import ROLE_NAMES, ImageEntry, ScanLog, find_images
from library.data.types import DatasetSpec, Record, ScanReport, SubsetSpec
from library.errors import UserError
from library.runtime.logs import LOGGER
from library.types import Size

_MOST_ITEMS = 20_000_000  # of an epoch, whose order is a list in memory
_MOST_PIXELS = 10**8  # of an image that is enlarged for its bucket


class _Header(NamedTuple):
    """The data of an image's header; `reason` why it cannot be used."""

    size: Size | None
    turned: bool = False
    frames: int = 1
    reason: str = ""


class _Seen(NamedTuple):
    """A record, and what only the report needs of it."""

    record: Record
    turned: bool  # by EXIF orientation
    moving: bool  # more than one frame
    captioned: bool  # a file says its caption, be it empty


def read_records(
    specs: Sequence[DatasetSpec], index: FileIndex, seed: int, *, strict: bool = False, main: bool = True
) -> tuple[list[Record], list[Record], ScanReport]:
    """Every usable image: (to train on, held out for validation, what was found on the way).

    The order is stable: by dataset, subset, path.

    Args:
        index: remembers what is seen.
        seed: of the choice of images that are held out, where the dataset has none of its own.
        strict: an image that cannot be used ends the run.
        main: whether this process is the one that writes metadata_cache.json, where that is asked for.

    Raises: UserError: nothing is left, captions cannot be read, or images of the wrong size without buckets.
    """
    scan, seen = ScanReport(), []
    log = ScanLog(scan.warnings, scan.dropped, [], scan.forgotten)
    for number, spec in enumerate(specs):
        for subset in spec.subsets:
            seen += _of_subset(subset, number, spec, index, scan, log, main=main)
    _check_contents([one.record for one in seen], index, scan)
    if strict:
        log.problems += [f"{path}: {reason} (--strict)" for path, reason in scan.dropped]
    if log.problems:
        raise UserError(*dict.fromkeys(log.problems))
    dropped = {path for path, _ in scan.dropped}
    seen = [one for one in seen if one.record.path not in dropped]
    for record, turned, moving, captioned in seen:  # those that were left out count nowhere else
        bucket, resized = record.bucket, record.resized
        if resized is not None and 2 * bucket.width * bucket.height < resized.width * resized.height:
            scan.cut.append(record.path)
        scan.turned += turned
        scan.moving += moving
        scan.latents_only += not record.present
        scan.uncaptioned += not captioned
        scan.without_words += not captioned and record.subset.class_tokens is None
        scan.empty_captions += captioned and record.caption == ""
    scan.forgotten[:] = [path for path in scan.forgotten if path not in dropped]
    records = [one.record for one in seen]
    train, held_out = hold_out(records, specs, seed, scan.copies)
    balanced = [
        record
        for number in range(len(specs))
        for record in balance_regularisation([r for r in train if r.dataset == number], scan)
    ]
    _check_what_is_left(balanced, specs, scan)
    return balanced, held_out, scan


def _of_subset(
    subset: SubsetSpec,
    number: int,
    spec: DatasetSpec,
    index: FileIndex,
    scan: ScanReport,
    log: ScanLog,
    *,
    main: bool,
) -> list[_Seen]:
    """The usable images of a subset of the dataset with this number."""
    first = len(log.uncaptioned)
    entries = find_images(subset, index, log)
    unseen = [one.path for one in entries if one.present and one.size is None]
    described = iter(index.learn("image", unseen, images.describe))
    headers = [
        _Header(one.size) if one.size is not None or not one.present else _as_header(next(described)) for one in entries
    ]
    pairs = list(zip(entries, headers, strict=True))
    small = [(one, header.size) for one, header in pairs if _is_small(header.size, spec)]
    if small:
        scan.small[number] = scan.small.get(number, 0) + len(small)
        left_out = {one.path for one, _ in small}
        log.uncaptioned[first:] = [path for path in log.uncaptioned[first:] if path not in left_out]
    large = [pair for pair in pairs if not _is_small(pair[1].size, spec)]
    found = _usable(large, subset, number, spec, scan, log.problems)
    if main and subset.cache_info and not log.problems and info_cache.read(subset.image_dir) is None:
        infos = {one.record.path: info_cache.Info(one.record.caption, one.record.size) for one in found}
        # Another dataset of the folder may use what this one leaves out.
        infos |= {one.path: info_cache.Info(_caption(one, subset), size) for one, size in small}
        info_cache.write(subset.image_dir, dict(sorted(infos.items())))
    return found


def _check_contents(records: Sequence[Record], index: FileIndex, scan: ScanReport) -> None:
    """Drops the images whose mask or control image cannot be used or whose pixels cannot be decoded.

    Also reports masks and control images of another shape than their image's, and exact and near duplicates.
    """
    of_records = ((record.mask or record.inpainting_mask or record.control, record) for record in records)
    partners = {partner: record for partner, record in of_records if partner is not None}
    seen = index.learn("image", list(partners), images.describe)
    for (partner, record), described in zip(partners.items(), seen, strict=True):
        header = _as_header(described)
        if header.size is None:
            what = ROLE_NAMES[record.subset.image_role]
            scan.dropped.append((record.path, f"its {what} {partner} cannot be used: {header.reason}"))
        elif abs(buckets.aspect_error(header.size, record.size)) > 0.02 * record.size.width / record.size.height:
            scan.other_shapes.append(partner)
    sizes = {record.path: record.size for record in records if record.present}
    scan.copies = near_duplicates.copies(sizes, index)
    decoded = near_duplicates.decode_all(list(sizes), scan.copies, index)
    scan.alike = None if decoded is None else decoded.alike
    for group in scan.alike or ():
        LOGGER.debug("near duplicates: %s", ", ".join(map(str, group)))
    scan.dropped += decoded.damaged.items() if decoded is not None else ()


_size = lru_cache(maxsize=10_000)(Size)  # one object for all images of a size: there may be millions


def _as_header(described: list | str) -> _Header:
    if isinstance(described, str):
        return _Header(None, reason=described)
    width, height, turned, frames = described
    return _Header(_size(width, height), turned, frames)


def _is_small(size: Size | None, spec: DatasetSpec) -> bool:
    """Whether the dataset leaves out images of this size: by their area, whatever their shape."""
    least = spec.skip_image_resolution
    return least is not None and size is not None and size.width * size.height <= least.width * least.height


def _caption(one: ImageEntry, subset: SubsetSpec) -> str:
    return one.caption if one.caption is not None else subset.class_tokens or ""


def _usable(
    images: Sequence[tuple[ImageEntry, _Header]],
    subset: SubsetSpec,
    number: int,
    spec: DatasetSpec,
    scan: ScanReport,
    problems: list[str],
) -> list[_Seen]:
    seen, wrong_size, fitted = [], [], []
    bucket_of = bucket_chooser(spec)
    for one, header in images:
        if header.size is None:
            scan.dropped.append((one.path, header.reason or "neither an image nor its size is known"))
            continue
        frame = _frame(one, header.size, subset, spec, bucket_of)
        if frame is None and not spec.enable_bucket and not spec.fits_any_size:
            wrong_size.append((one.path, header.size))
        elif frame is None:
            size = f"{header.size.width}x{header.size.height}"
            scan.dropped.append((one.path, f"{size} is too small or too narrow for a bucket"))
        else:
            if not spec.enable_bucket and one.bucket is None and frame[1] is not None:
                fitted.append(one.path)
            record = Record(
                path=one.path,
                caption=_caption(one, subset),
                size=header.size,
                bucket=frame[0],
                resized=frame[1],
                subset=subset,
                dataset=number,
                repeats=subset.num_repeats,
                present=one.present,
                flip=subset.flip_aug or one.flip_file,
                mask=one.conditioning if subset.image_role == "mask" and subset.masks_weigh else None,
                inpainting_mask=one.conditioning if subset.image_role == "mask" and subset.inpainting else None,
                control=one.conditioning if subset.image_role == "control" else None,
                tags=one.tags,
            )
            seen.append(_Seen(record, header.turned, header.frames > 1, one.caption is not None))
    varied = [name for name in ("color_aug", "random_crop", "face_crop_aug_range") if getattr(subset, name)]
    if varied and any(not one.record.present for one in seen):
        why = "needs the images, and some have latents only"
        problems.append(f"{subset.place}: {varied[0]} {why}; remove {varied[0]}")
    lacking = [one.record.path for one in seen if not one.record.present] if subset.inpainting else []
    if lacking:
        problems.append(
            f"{subset.place}: --train_inpainting needs the images, and {len(lacking)} have latents only, such as "
            f"{lacking[0].name}"
        )
    if fitted:
        scan.warnings.append(
            f"{subset.place}: {len(fitted)} of {len(images)} images do not have the size "
            f"{spec.resolution.width}x{spec.resolution.height} (the first is {fitted[0].name}); they are resized and "
            "cut at the centre; enable_bucket would keep their shapes"
        )
    if wrong_size:
        path, size = wrong_size[0]
        wanted = f"{spec.resolution.width}x{spec.resolution.height}"
        problems.append(
            f"{subset.place}: {len(wrong_size)} of {len(images)} images do not have the size {wanted} "
            f"(the first is {path.name}, {size.width}x{size.height}); set enable_bucket, or resize them"
        )
    return seen


def bucket_chooser(spec: DatasetSpec) -> Callable[[Size], Fit | None]:
    """Chooses the bucket for a size of images, once for all images that have it. None: the size fits into none."""
    step = spec.bucket_reso_steps
    if spec.bucket_no_upscale:
        return cache(lambda size: _if_not_endless(buckets.choose_no_upscale(size, spec.resolution, step)))
    limits = spec.min_bucket_reso, spec.max_bucket_reso
    sizes = buckets.bucket_sizes(spec.resolution, *limits, step) if spec.enable_bucket else [spec.resolution]
    return cache(lambda size: _if_not_endless(buckets.choose(size, sizes)))


def _if_not_endless(fit: Fit | None) -> Fit | None:
    """A strip of few pixels would be enlarged to more than fits into memory, and nearly all of it cut off."""
    return fit if fit is not None and fit.resized.width * fit.resized.height <= _MOST_PIXELS else None


def _frame(
    one: ImageEntry, size: Size, subset: SubsetSpec, spec: DatasetSpec, bucket_of: Callable[[Size], Fit | None]
) -> tuple[Size, Size | None] | None:
    """(bucket, resized) of an image, or None where it does not fit."""
    if one.bucket is not None and not one.present:
        return one.bucket, one.bucket
    if one.bucket is not None and not spec.enable_bucket:
        return buckets.choose(size, [one.bucket])
    if spec.enable_bucket:
        return bucket_of(size)
    if size == spec.resolution:
        return spec.resolution, None
    if spec.fits_any_size:
        return bucket_of(size)
    covers = size.width >= spec.resolution.width and size.height >= spec.resolution.height
    may_be_cut = subset.random_crop or (subset.face_crop_aug_range and images.face_box(one.path))
    return (spec.resolution, None) if covers and may_be_cut else None


def balance_regularisation(records: Sequence[Record], scan: ScanReport) -> list[Record]:
    """Evens out one dataset: regularisation images come until their repeats reach the training images'.

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
    scan.surplus_reg += len(regular) - len(used)
    more, rest = divmod(max(0, wanted - count), max(1, len(used)))
    return train + [
        replace(record, repeats=record.repeats + more + (position < rest)) for position, record in enumerate(used)
    ]


def _check_what_is_left(records: Sequence[Record], specs: Sequence[DatasetSpec], scan: ScanReport) -> None:
    empty = set(range(len(specs))) - {record.dataset for record in records if not record.subset.is_reg}
    if empty and len(empty) < len(specs):
        for number in sorted(empty):
            folders = ", ".join(str(subset.place) for subset in specs[number].subsets)
            scan.warnings.append(f"{folders}: no usable training image; the dataset is left out")
    elif empty:
        places = [str(s.place) for number in sorted(empty) for s in specs[number].subsets if not s.is_reg]
        folders = ", ".join(places) or "the data set, which names no folder"
        reasons = [f"{path}: {why}" for path, why in scan.dropped[:10]]
        if scan.small:
            reasons.append(f"{sum(scan.small.values())} have no more pixels than skip_image_resolution")
        raise UserError(f"no usable training image in {folders}", *reasons)
    if scan.without_words:
        scan.warnings.append(
            f"{scan.without_words} images have neither a caption file nor class tokens: they train on no text"
        )
    for line in scan.warnings:
        LOGGER.warning(line)
    items = sum(record.repeats for record in records)
    if items > _MOST_ITEMS:
        raise UserError(
            f"an epoch would have {items:,} images with their repeats, more than {_MOST_ITEMS:,}; lower num_repeats, "
            "or the repeats in the names of folders"
        )
