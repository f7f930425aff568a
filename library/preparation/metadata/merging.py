"""Captions or tags from the files beside images into a metadata file: merge_captions_to_metadata.py and its like."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from library.data.sample.captions import caption_name
from library.data.scan.folders import is_image
from library.data.scan.metadata_files import read_metadata
from library.errors import UserError
from library.options.base import Options
from library.options.metadata import MergeCaptionsOptions, MergeOptions, MergeTagsOptions
from library.options.preparation import WorkOptions
from library.preparation.common.images import find_images, read_ahead
from library.preparation.common.summary import Outcome
from library.preparation.common.texts import read_lines
from library.preparation.metadata.metadata_writer import NOT_UNICODE, is_unicode, require_writable, write_metadata
from library.runtime.logs import LOGGER
from library.screen import counted

Field = Literal["caption", "tags"]

CAPTION_GROUPS = (MergeCaptionsOptions, WorkOptions)
TAG_GROUPS = (MergeTagsOptions, WorkOptions)

_SHOWN = 3  # names in a message about several files


def merge_captions(opts: Options) -> Outcome:
    """The work of merge_captions_to_metadata.py. Raises: UserError."""
    return merge(opts.merge, "caption")


def merge_tags(opts: Options) -> Outcome:
    """The work of merge_dd_tags_to_metadata.py. Raises: UserError."""
    return merge(opts.merge, "tags")


def merge(options: MergeOptions, field: Field) -> Outcome:
    """Reads the text file of every image, and writes what it says into the metadata as `field`.

    What else the metadata says stays, and so does the order of its images; new ones follow, sorted. An image without
    a text file is left as it is.

    Raises: UserError: nothing can be read, no image has a text file, or the metadata cannot be read or written.
    """
    target = Path(options.out_json)
    require_writable(target, "out_json")
    source = Path(options.in_json) if options.in_json else target
    is_there = os.path.exists(source)
    if options.in_json is None and is_there:
        LOGGER.info("%s exists: its other entries are kept", source)
    needed = is_there or options.in_json is not None
    entries = read_metadata(source, may_be_empty=True) if needed else {}
    images = find_images(Path(options.train_data_dir), recursive=options.recursive)
    texts = text_files(images, options.caption_extension)
    keys = keys_of(images, entries, full_path=options.full_path)
    _report(texts, keys, entries, options)
    outcome = Outcome(skipped=len(images) - len(texts))
    empty = 0
    reading = read_ahead(list(texts), lambda image: read_lines(texts[image]), outcome, workers=None, desc="merging")
    for image, text in reading:
        key = keys[image]
        if not is_unicode(key):
            outcome.fail(image, NOT_UNICODE)
            continue
        empty += not text
        entries[key] = {**entries.get(key, {}), field: text}
        outcome.done += 1
    for image in texts if options.debug else ():
        if image not in outcome.failed:
            key = keys[image]
            LOGGER.info("%s: %s of %s: %s", texts[image], field, key, entries[key][field])
    if empty:
        LOGGER.warning("empty: %s", counted(empty, f"{options.caption_extension} file"))
    if outcome.done:
        write_metadata(target, entries)
        written, there = counted(outcome.done), counted(len(entries))
        LOGGER.info("%s: %s of %s written, %s in it", target, field, written, there)
    return outcome


def text_files(images: Sequence[Path], extension: str) -> dict[Path, Path]:
    """The text file of each image that has one.

    Raises: UserError: a folder cannot be read.
    """
    found = {}
    for image in images:
        name = caption_name(image.name, extension, _names_in(image.parent))
        if name is not None:
            found[image] = image.parent / name
    _names_in.cache_clear()  # of this moment only
    return found


@cache
def _names_in(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read ({error.strerror})") from None


def keys_of(images: Sequence[Path], entries: Mapping[str, Any], *, full_path: bool) -> dict[Path, str]:
    """The key of each image in the metadata.

    A path that `entries` have already stays as it is spelt there. Else it is the absolute path with `full_path`, as the
    next script may be started in another folder; and the stem without. Where several images of the folder share a
    stem it is the file name, as nothing else distinguishes them.
    """
    known = {os.path.abspath(key): key for key in entries if is_image(os.path.basename(key))}
    shared = Counter(image.stem for image in images)

    def name(image: Path) -> str:
        if full_path:
            return os.path.abspath(image)
        return image.name if shared[image.stem] > 1 or image.name in entries else image.stem

    return {image: known.get(os.path.abspath(image)) or name(image) for image in images}


def _report(
    texts: Mapping[Path, Path], keys: Mapping[Path, str], entries: Mapping[str, Any], options: MergeOptions
) -> None:
    """Warns of images without a text file, and of entries that may be of the same images by another name.

    Raises: UserError: no image has a text file.
    """
    extension, folder, images = options.caption_extension, options.train_data_dir, list(keys)
    if not texts:
        other = [ending for ending in (".caption", ".txt") if ending != extension and text_files(images, ending)]
        hint = f", such as --caption_extension={other[0]}, of which there are some" if other else ""
        raise UserError(
            f"none of {counted(len(images))} in {folder} has a {extension} file beside it; "
            f"give the extension of your files with --caption_extension{hint}"
        )
    missing = [image for image in images if image not in texts]
    if missing:
        names = ", ".join(str(image.relative_to(folder)) for image in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        LOGGER.warning(
            "%d of %s without a %s file, left out: %s%s",
            len(missing), counted(len(images)), extension, names, more,
        )  # fmt: skip
    twice = [
        other for image, key in keys.items() for other in (image.name, image.stem) if other in entries and key != other
    ]
    if twice:
        LOGGER.warning(
            "%s without a folder in the metadata, such as '%s', may mean images that are there by path now; "
            "training takes one name for each, so remove the others, or begin with another --in_json",
            counted(len(twice), "name"), twice[0],
        )  # fmt: skip
