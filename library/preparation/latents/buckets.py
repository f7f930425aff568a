"""prepare_buckets_latents.py: images into buckets, latents beside them, and the buckets into a metadata file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library.errors import UserError
from library.families.registry import FAMILIES
from library.options.base import COMMAND_LINE, Given, Options, build_options, opt
from library.options.bucketing import BucketingOptions
from library.options.data import DataOptions
from library.options.large_models import LargeModelOptions
from library.options.loss import LossOptions
from library.options.memory import DistributedOptions, MemoryOptions
from library.options.preparation import WorkOptions
from library.options.training import TrainingOptions
from library.preparation.common.images import all_gather, find_images, is_first, require_room_beside
from library.preparation.common.summary import Outcome
from library.preparation.latents import encoders as parts
from library.preparation.metadata.metadata_writer import NOT_UNICODE, is_unicode, require_writable, write_metadata
from library.runtime.logs import LOGGER
from library.screen import counted

if TYPE_CHECKING:
    from library.data.scan.index import FileIndex
    from library.data.types import DatasetSpec, Record
    from library.families.spec import FamilySpec

# What messages about training's options are about here.
_OUR_NAMES = {"--resolution:": "--max_resolution:", "--in_json:": "in_json:", "--train_data_dir:": "train_data_dir:"}


@dataclass(frozen=True, kw_only=True)
class ModelBucketingOptions(BucketingOptions):
    family: Literal[tuple(FAMILIES)] | None = opt(
        None, "model family, where its file does not show it: a VAE alone, or a hub id without network"
    )


GROUPS = (ModelBucketingOptions, WorkOptions)


def prepare(opts: Options) -> Outcome:
    """Encodes the images of a folder and writes the metadata file.

    Raises: UserError: options, model or metadata file cannot be used, or a file cannot be written.
    """
    from library.data.sample.buckets import aspect_error
    from library.data.sample.opencv import opencv
    from library.data.scan.index import FileIndex
    from library.data.scan.metadata_files import read_metadata
    from library.families.shared.finding import family_of
    from library.runtime.paths import cache_folder

    opencv()
    options, outcome = opts.bucketing, Outcome()
    out = Path(options.out_json)
    if is_first():
        require_writable(out, "out_json")
    family = FAMILIES[options.family or family_of(options.model_name_or_path)]
    training, spec = _as_training(options, family)
    metadata = read_metadata(Path(options.in_json))
    images = find_images(Path(options.train_data_dir), recursive=options.recursive)
    index = FileIndex(cache_folder() / "index")
    keys = dict(_keys(images, metadata, options, index, outcome))
    for image in [image for image, key in keys.items() if not is_unicode(key)]:
        outcome.fail(image, NOT_UNICODE)
        del keys[image]
    records = list(_records(list(keys), spec, index, outcome))
    kept = _encode(records, family, training, options, index, outcome) if records else 0
    failed = {path for one in all_gather(set(outcome.failed)) for path in one}
    if not is_first():
        return outcome
    index.save()
    done = [record for record in records if record.path not in failed]
    noted = {key: dict(entry) for key, entry in metadata.items()}
    for key in keys.values():
        noted.get(key, {}).pop("train_resolution", None)  # of an image that has failed now, for one
    stride = family.traits.latent_stride
    for record in done:
        entry = noted.setdefault(keys[record.path], {})
        entry["train_resolution"] = [side - side % stride for side in record.bucket]
        entry["image_size"] = list(record.size)
    write_metadata(out, noted)
    for bucket, count in sorted(Counter(record.bucket for record in done).items()):
        LOGGER.info("bucket %dx%d: %s", *bucket, counted(count))
    error = sum(aspect_error(record.bucket, record.size) for record in done) / max(1, len(done))
    LOGGER.info("mean aspect error: %.4f", error)
    outcome.skipped, outcome.done = kept, len(done) - kept
    return outcome


# ---- as training would see it


def _as_training(options: ModelBucketingOptions, family: FamilySpec) -> tuple[Options, DatasetSpec]:
    """The options of a training run on these images that encodes them alike, and the spec of its data set.

    Raises: UserError: sizes that do not go together.
    """
    from library.data.config.blueprint import build_specs

    said = {
        "pretrained_model_name_or_path": options.model_name_or_path,
        "v2": options.v2,
        "train_data_dir": options.train_data_dir,
        "in_json": options.in_json,
        "resolution": options.max_resolution,
        "enable_bucket": True,
        "cache_latents_to_disk": True,
        "alpha_mask": options.keeps_alpha,
        "vae_batch_size": options.batch_size,
    }
    same = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale", "flip_aug")
    said |= {name: getattr(options, name) for name in (*same, "mixed_precision", "seed")}
    groups = (
        *(LargeModelOptions, family.options, DataOptions, LossOptions, TrainingOptions),
        *(MemoryOptions, DistributedOptions),
    )
    training = build_options(groups, {name: Given(value, COMMAND_LINE) for name, value in said.items()})
    try:
        (spec,) = build_specs(training, family.traits)
    except UserError as error:
        problems = error.problems
        for theirs, ours in _OUR_NAMES.items():
            problems = [problem.replace(theirs, ours) for problem in problems]
        raise UserError(*(text.removeprefix("--train_data_dir: ") for text in problems), hint=error.hint) from None
    return training, spec


# ---- images and their entries


def _keys(
    images: Sequence[Path],
    metadata: Mapping[str, Mapping[str, Any]],
    options: ModelBucketingOptions,
    index: FileIndex,
    outcome: Outcome,
) -> Iterator[tuple[Path, str]]:
    """Every image with the key of its entry; those without an entry get one."""
    from library.data.scan.metadata_files import resolve

    folder, file = Path(options.train_data_dir), Path(options.in_json)
    entries, _ = resolve(metadata, folder, index.listing, file=file, separator=",", wildcard=False)
    known = {_address(entry.image): entry.key for entry in entries if entry.image is not None}
    stems = Counter(_address(image.with_suffix("")) for image in images)
    found = 0
    for image in images:
        if _address(image) in known:
            found += 1
            yield image, known[_address(image)]
        elif options.full_path:
            yield image, os.path.abspath(image)
        elif stems[_address(image.with_suffix(""))] == 1:
            yield image, image.stem
        elif image.stem in metadata:
            outcome.fail(image, f"'{image.stem}' in {file} may be it or another; write it with its extension")
        else:
            yield image, image.name
    if found < len(images):
        new = counted(len(images) - found)
        LOGGER.info("%s not in %s, with an entry without a caption from now on", new, file)
    if found < len(metadata):
        others = counted(len(metadata) - found, "entry", "entries")
        LOGGER.info("%s: %s of other images left as before", file, others)


def _address(path: Path) -> tuple[str, str]:
    """Compares paths however their folders are written."""
    return os.path.realpath(path.parent), path.name


def _records(paths: Sequence[Path], spec: DatasetSpec, index: FileIndex, outcome: Outcome) -> Iterator[Record]:
    from library.data.sample import images
    from library.data.scan.records import bucket_chooser
    from library.data.types import Record
    from library.types import Size

    choose, subset = bucket_chooser(spec), spec.subsets[0]
    for image, seen in zip(paths, index.learn("image", paths, images.describe), strict=True):
        if isinstance(seen, str):
            outcome.fail(image, seen)
            continue
        size = Size(*seen[:2])
        fit = choose(size)
        if fit is None:
            outcome.fail(image, f"{size.width}x{size.height} is too small or too narrow for a bucket")
            continue
        yield Record(image, "", size, fit.bucket, fit.resized, subset, 0, 1, flip=subset.flip_aug)


# ---- latents


def _encode(
    records: Sequence[Record],
    family: FamilySpec,
    training: Options,
    options: ModelBucketingOptions,
    index: FileIndex,
    outcome: Outcome,
) -> int:
    """Makes the latents of this process's share. Returns: how many were there before, of all."""
    from library import encoding
    from library.caching import latents
    from library.checkpoints.hashes import weights_fingerprint
    from library.training import placement

    adapter = family.adapter(training)
    layout, again = encoding.latent_layout(adapter.traits), not options.skip_existing
    unclear = _with_unclear_flips([record.path for record in records])
    groups = [
        (layout, [record for record in records if record.path in unclear]),
        (replace(layout, as_prepared=True), [record for record in records if record.path not in unclear]),
    ]
    made = (path for layout, group in groups for path in latents.without_files(group, index, layout))
    require_room_beside((record.path for record in records) if again else made, "latents")
    try:
        models = parts.load_vae(family, training)
    except UserError as error:
        ours = f"in place of the model, and --family {family.name}"
        named = (problem.replace("with --ae", ours).replace("with --vae", ours) for problem in error.problems)
        raise UserError(*named) from None
    accelerator = parts.make_accelerator(training)
    fingerprint = weights_fingerprint(models.vae)
    placement.place_vae(models, training, accelerator.device)
    encoder = encoding.latent_encoder(training, adapter, models, accelerator)
    encoder = replace(encoder, workers=options.max_data_loader_n_workers)
    kept = 0
    for names, group in groups:
        if group:
            result = latents.cache_on_disk(
                group, index, encoder, names, fingerprint, again=again, on_error=outcome.fail
            )
            kept += result.kept
    return kept


def _with_unclear_flips(images: Sequence[Path]) -> set[Path]:
    """Images such as a.png and a_flip.png: the mirrored latents of one would be named as the latents of the other.

    All of one stem together, as a.jpg and a.png have to be distinguished as well.
    """
    bases: dict[Path, set[Path]] = {}
    for image in images:
        bases.setdefault(image.with_suffix(""), set()).add(image)
    unclear: set[Path] = set()
    for base, same_stem in bases.items():
        mirrored = bases.get(base.with_name(f"{base.name}_flip"))
        if mirrored is not None:
            unclear |= same_stem | mirrored
    return unclear
