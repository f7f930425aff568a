"""Captions or tags from the files beside pictures into a metadata file: merge_captions_to_metadata.py and its like."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from library.data.captions import caption_name
from library.data.folders import is_image
from library.data.metadata_files import read_metadata
from library.errors import UserError
from library.options.base import Options
from library.options.metadata import MergeCaptionsOptions, MergeOptions, MergeTagsOptions
from library.options.preparation import WorkOptions
from library.preparation.metadata import NOT_UNICODE, is_unicode, require_writable, write_metadata
from library.preparation.outcome import Outcome, counted
from library.preparation.pictures import find_pictures, read_ahead
from library.preparation.texts import read_lines
from library.runtime.logs import LOGGER

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
    """Reads the text file of every picture, and writes what it says into the metadata as `field`.

    What else the metadata says stays, and so does the order of its pictures; new ones follow, sorted. A picture without
    a text file is left as it is.

    Raises: UserError: nothing can be read, no picture has a text file, or the metadata cannot be read or written.
    """
    target = Path(options.out_json)
    require_writable(target, "out_json")
    entries = _entries_before(options, target)
    pictures = find_pictures(Path(options.train_data_dir), recursive=options.recursive)
    texts = text_files(pictures, options.caption_extension)
    _tell_missing(pictures, texts, options)
    keys = keys_of(pictures, entries, full_path=options.full_path)
    _tell_two_names(keys, entries)
    outcome = Outcome(skipped=len(pictures) - len(texts))
    empty = 0
    reading = read_ahead(list(texts), lambda picture: read_lines(texts[picture]), outcome, workers=None, desc="merging")
    for picture, text in reading:
        key = keys[picture]
        if not is_unicode(key):
            outcome.fail(picture, NOT_UNICODE)
            continue
        empty += not text
        entries[key] = {**entries.get(key, {}), field: text}
        outcome.done += 1
    for picture in texts if options.debug else ():
        if picture not in outcome.failed:
            key = keys[picture]
            LOGGER.info("%s: %s of %s: %s", texts[picture], field, key, entries[key][field])
    if empty:
        LOGGER.warning("empty: %s", counted(empty, f"{options.caption_extension} file"))
    if outcome.done:
        write_metadata(target, entries)
        written, there = counted(outcome.done), counted(len(entries))
        LOGGER.info("%s: %s of %s written, %s in it", target, field, written, there)
    return outcome


def _entries_before(options: MergeOptions, target: Path) -> dict[str, dict[str, Any]]:
    source = Path(options.in_json) if options.in_json else target
    if options.in_json is None:
        if not os.path.exists(source):
            return {}
        LOGGER.info("%s is there already: what it says of other things stays", source)
    return read_metadata(source, may_be_empty=True)


def text_files(pictures: Sequence[Path], extension: str) -> dict[Path, Path]:
    """The text file of each picture that has one.

    Raises: UserError: a folder cannot be read.
    """
    found = {}
    for picture in pictures:
        name = caption_name(picture.name, extension, _names_in(picture.parent))
        if name is not None:
            found[picture] = picture.parent / name
    _names_in.cache_clear()  # of this moment only
    return found


@cache
def _names_in(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read ({error.strerror})") from None


def keys_of(pictures: Sequence[Path], entries: Mapping[str, Any], *, full_path: bool) -> dict[Path, str]:
    """What each picture is called in the metadata.

    A path that `entries` have already stays as it is spelt there. Else it is the absolute path with `full_path`, as the
    next script may be started in another folder; and the stem without. Where several pictures of the folder share a
    stem it is the file name, as nothing else tells them apart.
    """
    known = {os.path.abspath(key): key for key in entries if is_image(os.path.basename(key))}
    shared = Counter(picture.stem for picture in pictures)

    def name(picture: Path) -> str:
        if full_path:
            return os.path.abspath(picture)
        return picture.name if shared[picture.stem] > 1 or picture.name in entries else picture.stem

    return {picture: known.get(os.path.abspath(picture)) or name(picture) for picture in pictures}


def _tell_missing(pictures: Sequence[Path], texts: Mapping[Path, Path], options: MergeOptions) -> None:
    extension, folder = options.caption_extension, options.train_data_dir
    if not texts:
        raise UserError(
            f"none of {counted(len(pictures))} in {folder} has a {extension} file beside it; "
            f"name the ending of your files with --caption_extension{_others(pictures, extension)}"
        )
    missing = [picture for picture in pictures if picture not in texts]
    if missing:
        names = ", ".join(str(picture.relative_to(folder)) for picture in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        LOGGER.warning(
            "%d of %s without a %s file, left out: %s%s",
            len(missing), counted(len(pictures)), extension, names, more,
        )  # fmt: skip


def _tell_two_names(keys: Mapping[Path, str], entries: Mapping[str, Any]) -> None:
    twice = [
        other
        for picture, key in keys.items()
        for other in (picture.name, picture.stem)
        if other in entries and key != other
    ]
    if twice:
        LOGGER.warning(
            "%s without a folder in the metadata, such as '%s', may mean pictures that are there by path now; "
            "training takes one name for each, so remove the others, or begin with another --in_json",
            counted(len(twice), "name"), twice[0],
        )  # fmt: skip


def _others(pictures: Sequence[Path], extension: str) -> str:
    """A hint where files of another usual ending are there."""
    other = [ending for ending in (".caption", ".txt") if ending != extension and text_files(pictures, ending)]
    return f", such as --caption_extension={other[0]}, of which there are some" if other else ""
