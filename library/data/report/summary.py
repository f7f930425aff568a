"""What the data amounts to: lines for the log, and the ss_* metadata of trained files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from library.data.sample.buckets import aspect_error
from library.data.scan import near_duplicates
from library.types import Size

if TYPE_CHECKING:
    from library.data.types import DatasetSpec, Record, ScanReport, SubsetSpec
    from library.options.base import Options


class DataSummary(Protocol):
    """The data from which the report and the metadata are made."""

    specs: Sequence[DatasetSpec]
    records: Sequence[Record]
    scan: ScanReport
    opts: Options
    held_out: DataSummary | None
    num_train_images: int
    num_reg_images: int
    batches_per_epoch: int


_NAMED = 10  # files of one kind that are named one by one
_AS_GIVEN = ("color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens")


def report(data: DataSummary) -> list[str]:
    """The lines that the user sees before training. Every image that is left out is named."""
    scan = data.scan
    lines = []
    for number, spec in enumerate(data.specs):
        own = [record for record in data.records if record.dataset == number]
        lines += _dataset_lines(spec, own, number)
        options = data.opts.data
        guessed = options.in_json and options.resolution is None and not options.dataset_config
        if guessed and (spec.enable_bucket or any(record.bucket == spec.resolution for record in own)):
            size = f"{spec.resolution.width}x{spec.resolution.height}"
            lines.append(f"  --resolution was not given: images without prepared latents are trained at {size}")
        if number in scan.small:
            least = f"{spec.skip_image_resolution.width}x{spec.skip_image_resolution.height}"
            lines.append(f"  {_images(scan.small[number])} skipped, with no more pixels than {least}")
    if data.held_out is not None:
        lines.append(f"held out for validation: {len(data.held_out.records)} images")
    notes = (
        (scan.turned, "turned upright as their EXIF orientation says"),
        (scan.moving, "with several frames: the first one is used"),
        (scan.latents_only, "of which only latents are there"),
        (scan.uncaptioned - scan.without_words, "without a caption: their class tokens are the caption"),
        (scan.without_words, "with neither a caption nor class tokens: they train on no text"),
        (scan.empty_captions, "with an empty caption: they train on no text"),
        (scan.surplus_reg, "for regularisation not used: there are more than training images times repeats"),
        (len(scan.dropped), "left out"),
    )
    lines += [f"{_images(count)} {text}" for count, text in notes if count]
    lines += [f"left out: {path}: {reason}" for path, reason in scan.dropped]
    groups: dict[Path, list[Path]] = {}
    for path, first in scan.copies.items():
        groups.setdefault(first, []).append(path)
    lines += [f"the same image: {_joined(group)}" for group in list(groups.values())[:_NAMED]]
    if len(groups) > _NAMED:
        lines.append(f"and {len(groups) - _NAMED} more groups of equal files")
    if scan.alike is None:
        most = near_duplicates.MOST
        lines.append(f"images were not decoded to find damaged ones and near duplicates, as there are more than {most}")
    elif scan.alike:  # one line: similar images are usual, and no fault
        count = f"{len(scan.alike)} group{'' if len(scan.alike) == 1 else 's'} of near duplicates"
        more = "" if len(scan.alike) == 1 else "; --console_log_level=DEBUG lists them all"
        lines.append(f"{count}, such as {_joined(scan.alike[0])}{more}")
    forgotten = list(dict.fromkeys(scan.forgotten))
    lines += _named(forgotten, f"{_images(len(forgotten))} without a caption where most of the folder have one")
    cut = list(dict.fromkeys(scan.cut))
    lines += _named(cut, f"{_images(len(cut))} of an odd shape, of which more than half is cut off")
    shapes = scan.other_shapes
    what = "control images" if any(record.control for record in data.records) else "masks"
    lines += _named(shapes, f"{len(shapes)} {what} of another shape than their images, stretched to fit")
    return lines


def findings(data: DataSummary) -> list[tuple[str, list[tuple[Path, str]]]]:
    """What was left out, is odd, or is kept for validation, with the files and what is to be said of each."""
    scan = data.scan
    held_out = [] if data.held_out is None else data.held_out.records
    kinds: list[tuple[str, list[tuple[Path, str]]]] = [
        ("Left out", list(scan.dropped)),
        ("More than half is cut off", [(path, "an odd shape") for path in dict.fromkeys(scan.cut)]),
        ("Without a caption", [(path, "most of its folder have one") for path in dict.fromkeys(scan.forgotten)]),
        ("The same image twice", [(path, f"equal to {first.name}") for path, first in scan.copies.items()]),
        ("Near duplicates", [(p, f"similar to {group[0].name}") for group in scan.alike or () for p in group[1:]]),
        ("Kept for validation", [(record.path, record.caption) for record in held_out]),
    ]
    return [(title, files) for title, files in kinds if files]


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"


def _named(paths: Sequence[Path], text: str) -> list[str]:
    """ "text: a, b, ..." where there are any."""
    shown = ", ".join(str(path) for path in paths[:_NAMED])
    return [f"{text}: {shown}{', ...' if len(paths) > _NAMED else ''}"] if paths else []


def _joined(group: Sequence[Path]) -> str:
    return ", ".join(map(str, group[:_NAMED])) + (f" and {len(group) - _NAMED} more" if len(group) > _NAMED else "")


def _dataset_lines(spec: DatasetSpec, records: Sequence[Record], number: int) -> list[str]:
    train = [record for record in records if not record.subset.is_reg]
    counts = _bucket_counts(records)
    # Prepared latents have sizes of their own.
    whole = next(iter(counts)) if len(counts) == 1 and not spec.enable_bucket else spec.resolution
    several = len(counts) > 1 and not spec.enable_bucket and spec.resolution not in counts
    size = f"{len(counts)} sizes" if several else f"{whole.width}x{whole.height}"
    lines = [
        f"dataset {number + 1}: {size}, batch size {spec.batch_size}: "
        f"{len(train)} images, {sum(record.repeats for record in train)} with repeats"
    ]
    regular = [record for record in records if record.subset.is_reg]
    if regular:
        lines[0] += f"; {len(regular)} for regularisation, {sum(record.repeats for record in regular)} with repeats"
    for subset in spec.subsets:
        own = [record for record in records if record.subset is subset]
        kind = " (regularisation)" if subset.is_reg else ""
        lines.append(f"  {subset.place}{kind}: {len(own)} images x {subset.num_repeats}")
    if spec.enable_bucket or len(counts) > 1:
        for bucket, count in sorted(counts.items()):
            lines.append(f"  bucket {bucket.width}x{bucket.height}: {count} images with repeats")
        lines.append(f"  {_cropping(records)}")
    return lines


def _cropping(records: Sequence[Record]) -> str:
    lost = []
    for record in records:
        bucket, whole = record.bucket, record.resized or record.size
        lost.append((1 - bucket.width * bucket.height / (whole.width * whole.height), record.path.name))
    most, where = max(lost)
    if most <= 0:
        return "no image is cropped"
    mean = sum(share for share, _ in lost) / len(lost)
    return f"cropping takes {100 * mean:.1f} % of an image on average, at most {100 * most:.1f} % ({where})"


def metadata(data: DataSummary, processes: int) -> dict[str, Any]:
    """ss_* values about the data; numbers, or JSON text where the format has structures."""
    options = data.opts.data
    values: dict[str, Any] = {
        "ss_num_train_images": data.num_train_images,
        "ss_num_reg_images": data.num_reg_images,
        "ss_num_validation_images": len(data.held_out.records) if data.held_out is not None else 0,
        "ss_num_batches_per_epoch": data.batches_per_epoch,
        "ss_caption_dropout_rate": options.caption_dropout_rate,
        "ss_caption_dropout_every_n_epochs": options.caption_dropout_every_n_epochs,
        "ss_caption_tag_dropout_rate": options.caption_tag_dropout_rate,
        "ss_face_crop_aug_range": options.face_crop_aug_range,
        "ss_resize_interpolation": options.resize_interpolation,
    }
    if options.dataset_config:
        return values | _of_config(data)
    spec = data.specs[0]
    train = [(spec, subset) for subset in spec.subsets if not subset.is_reg]
    regular = [(spec, subset) for subset in spec.subsets if subset.is_reg]
    return values | {
        "ss_batch_size_per_device": spec.batch_size,
        "ss_total_batch_size": spec.batch_size * processes,
        "ss_resolution": str(tuple(spec.resolution)),
        **{f"ss_{name}": getattr(options, name) for name in _AS_GIVEN},
        "ss_enable_bucket": spec.enable_bucket,
        "ss_bucket_no_upscale": spec.bucket_no_upscale,
        "ss_min_bucket_reso": spec.min_bucket_reso,
        "ss_max_bucket_reso": spec.max_bucket_reso,
        "ss_dataset_dirs": json.dumps(_folders(train, data.records), ensure_ascii=False),
        "ss_reg_dataset_dirs": json.dumps(_folders(regular, data.records), ensure_ascii=False),
        "ss_tag_frequency": json.dumps(_tag_frequency(data.records), ensure_ascii=False),
        "ss_bucket_info": json.dumps(_bucket_info(spec, data.records), ensure_ascii=False),
    }


def _of_config(data: DataSummary) -> dict[str, Any]:
    datasets = []
    for number, spec in enumerate(data.specs):
        records = [record for record in data.records if record.dataset == number]
        datasets.append(
            {
                "is_dreambooth": not any(subset.metadata_file for subset in spec.subsets),
                "batch_size_per_device": spec.batch_size,
                "num_train_images": sum(record.repeats for record in records if not record.subset.is_reg),
                "num_reg_images": sum(record.repeats for record in records if record.subset.is_reg),
                "resolution": list(spec.resolution),
                "enable_bucket": spec.enable_bucket,
                "min_bucket_reso": spec.min_bucket_reso,
                "max_bucket_reso": spec.max_bucket_reso,
                "skip_image_resolution": spec.skip_image_resolution and list(spec.skip_image_resolution),
                "tag_frequency": _tag_frequency(records),
                "bucket_info": _bucket_info(spec, records),
                "resize_interpolation": spec.resize_interpolation,
                "subsets": [_describe_subset(subset, records) for subset in spec.subsets],
            }
        )
    frequency: dict[str, Counter[str]] = {}
    for dataset in datasets:
        for name, counts in dataset["tag_frequency"].items():
            # The same folder at several resolutions has the same captions; they count once.
            frequency.setdefault(name, counts)
    subsets = [(spec, subset) for spec in data.specs for subset in spec.subsets if not subset.is_reg]
    return {
        "ss_datasets": json.dumps(datasets, ensure_ascii=False),
        "ss_tag_frequency": json.dumps(frequency, ensure_ascii=False),
        "ss_dataset_dirs": json.dumps(_folders(subsets, data.records), ensure_ascii=False),
    }


def _describe_subset(subset: SubsetSpec, records: Sequence[Record]) -> dict[str, Any]:
    captions = subset.captions
    own: dict[str, Any] = {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
    if subset.metadata_file is not None:
        own = {"metadata_file": _name(subset.metadata_file)}
    names = ("shuffle_caption", "keep_tokens", "keep_tokens_separator", "secondary_separator", "enable_wildcard")
    return {
        "img_count": sum(record.subset is subset for record in records),
        "num_repeats": subset.num_repeats,
        "color_aug": subset.color_aug,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        **{name: getattr(captions, name) for name in names},
        "caption_prefix": captions.caption_prefix,
        "caption_suffix": captions.caption_suffix,
        "resize_interpolation": subset.resize_interpolation,
        "image_dir": subset.image_dir and _name(subset.image_dir),
        **own,
    }


def _place_name(subset: SubsetSpec) -> str:
    """The name of a subset in ss_* metadata: its metadata file, or its folder."""
    return _name(subset.metadata_file or subset.place)


def _name(path: Path) -> str:
    return path.name or path.resolve().name  # Path(".") has no name of its own


def _folders(subsets: Iterable[tuple[DatasetSpec, SubsetSpec]], records: Sequence[Record]) -> dict[str, Any]:
    """{folder name: repeats and images}; equal names get " (2)", " (3)", ..."""
    found: dict[str, Any] = {}
    for _, subset in subsets:
        name, number = _place_name(subset), 2
        while name in found:
            name, number = f"{_place_name(subset)} ({number})", number + 1
        count = sum(record.subset is subset for record in records)
        found[name] = {"n_repeats": subset.num_repeats, "img_count": count}
    return found


def _tag_frequency(records: Sequence[Record]) -> dict[str, Counter[str]]:
    """{folder name: {tag: images that have it}}, over captions as they are on disk; in metadata files, the tags."""
    found: dict[str, Counter[str]] = {}
    for record in records:
        text = record.caption if record.tags is None else record.tags
        tags = {tag.strip().lower() for tag in text.replace("\n", ",").split(",")} - {""}
        found.setdefault(_place_name(record.subset), Counter()).update(sorted(tags))
    return found


def _bucket_counts(records: Sequence[Record]) -> dict[Size, int]:
    counts: Counter[Size] = Counter()
    for record in records:
        counts[record.bucket] += record.repeats
    return counts


def _bucket_info(spec: DatasetSpec, records: Sequence[Record]) -> dict[str, Any] | None:
    if not spec.enable_bucket:
        return None
    counts = sorted(_bucket_counts(records).items())
    buckets = {str(n): {"resolution": list(bucket), "count": count} for n, (bucket, count) in enumerate(counts)}
    return {"buckets": buckets, "mean_img_ar_error": _mean_aspect_error(records)}


def _mean_aspect_error(records: Sequence[Record]) -> float:
    return sum(aspect_error(record.bucket, record.size) for record in records) / max(1, len(records))
