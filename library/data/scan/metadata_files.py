"""Metadata files of fine-tuning data sets: captions, tags and sizes by image, as JSON or JSON Lines."""

from __future__ import annotations

import ntpath
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from library.data.scan.folders import is_image
from library.data.scan.index import collector_paused
from library.errors import UserError
from library.runtime.documents import JsonError, json_decoder, load_json, read_text
from library.types import Size

_LARGEST = 4 << 30  # bytes; millions of images
_SHOWN = 10  # problems of one file that are named one by one
_KEY_NAMES = ("image_path", "file_name")  # of a JSON Lines entry; the first one there counts
_SURROGATE = re.compile("[\ud800-\udfff]")  # what an escape such as \ud83d alone leaves, which no tokenizer takes
_CACHE = re.compile(r"(.+)_\d+x\d+_.+\.npz", re.DOTALL)  # <stem>_<width>x<height>_<what it is for>.npz


class Entry(NamedTuple):
    """One image of a metadata file."""

    key: str  # as the file says
    image: Path | None  # None: there are only latents
    base: Path  # folder / stem: cache files are this and a suffix. Stems may hold dots, so never use with_suffix
    caption: str  # caption and tags, see `join_caption`
    captioned: bool  # the file gives a caption or tags, be they empty
    tags: str | None  # as the file says
    image_size: Size | None  # as the file says; taggers and earlier tools ignore EXIF orientation
    train_resolution: Size | None  # the bucket that prepare_buckets_latents chose


@collector_paused()
def read_metadata(path: Path, *, may_be_empty: bool = False) -> dict[str, dict[str, Any]]:
    """The entries of the file by image: ``{key: {"caption", "tags", "image_size", "train_resolution", ...}}``.

    A `.jsonl` file has one object per line, with the key as "image_path" or "file_name"; any other is one JSON object.
    The four named values are checked, and each may be missing or null; others are passed on as they are.

    Raises: UserError: the file is missing, not UTF-8, malformed, or has values of the wrong type; or it is empty, and
        `may_be_empty` does not say otherwise.
    """
    if not os.path.lexists(path):
        raise UserError(f"there is no metadata file {path}; check --in_json, or metadata_file")
    text = read_text(path, "the metadata file", limit=_LARGEST)
    problems: list[str] = []
    parse = _parse_lines if path.suffix.lower() == ".jsonl" else _parse_object
    entries = parse(text, path, problems)
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"{path}: and {len(problems) - _SHOWN} more problems"]
    if problems:
        raise UserError(*problems)
    if not entries and not may_be_empty:
        raise UserError(
            f"{path}: there are no images in it; add captions with merge_captions_to_metadata.py, "
            "or tags with merge_dd_tags_to_metadata.py"
        )
    return entries


def as_size(value: Any) -> Size | None:
    """``[width, height]`` from JSON as a size; None where it is anything but two whole numbers from 1 up."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    width, height = value
    whole = type(width) is int and type(height) is int  # True is an int to isinstance
    return Size(width, height) if whole and width > 0 and height > 0 else None


def _parse_object(text: str, path: Path, problems: list[str]) -> dict[str, dict[str, Any]]:
    if not text.strip():
        return {}
    repeated: list[str] = []
    try:
        entries = load_json(text, json_decoder(repeated))
    except JsonError as error:
        hint = "one object per line is read from files called .jsonl" if error.goes_on else None
        raise UserError(f"{path}: {error}", hint=hint) from None
    if not isinstance(entries, dict):
        raise UserError(f'{path}: must hold one object, {{"<image>": {{"caption": "...", "tags": "..."}}, ...}}')
    problems += [f"{path}: '{key}' stands there twice and says different things; keep one" for key in repeated]
    for key, entry in entries.items():
        problems += _check_entry(entry, path, f"'{key}'")
    return entries


def _parse_lines(text: str, path: Path, problems: list[str]) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    repeated: list[str] = []
    decoder = json_decoder(repeated)
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON text
        if not line.strip():
            continue
        place = f"line {number}"
        repeated.clear()
        try:
            entry = load_json(line, decoder)
        except JsonError as error:
            column = "" if error.column is None else f", column {error.column}"
            problems.append(f"{path}: {place}{column}: {error.problem}")
            continue
        found = list(_check_entry(entry, path, place))
        found += [f"{path}: {place}: '{name}' stands there twice; keep one" for name in repeated]
        problems += found
        if found:
            continue
        key = next((entry[name] for name in _KEY_NAMES if name in entry), None)
        rest = {name: value for name, value in entry.items() if name not in _KEY_NAMES}
        sides = [rest.get("width"), rest.get("height")]
        if as_size(sides) is not None:  # count more than image_size, in lines alone
            rest["image_size"] = sides
        if not isinstance(key, str) or not key:
            problems.append(f'{path}: {place}: no image is named; write "image_path": "<file>"')
        elif entries.setdefault(key, rest) != rest:
            problems.append(f"{path}: {place}: '{key}' stands there twice and says different things; keep one")
    return entries


def _check_entry(entry: Any, path: Path, place: str) -> Iterator[str]:
    if not isinstance(entry, dict):
        shown = reprlib.repr(entry)
        yield f'{path}: {place}: must be an object such as {{"caption": "...", "tags": "..."}}, got {shown}'
        return
    for name in ("caption", "tags"):
        value = entry.get(name)
        if value is not None and not isinstance(value, str):
            yield f"{path}: {place}: {name} must be text, got {reprlib.repr(value)}"
        elif value and not value.isascii() and _SURROGATE.search(value):
            yield f"{path}: {place}: {name} holds an incomplete character (a lone surrogate); write it again"
    for name in ("image_size", "train_resolution"):
        value = entry.get(name)
        if value is not None and as_size(value) is None:
            shown = reprlib.repr(value)
            yield f"{path}: {place}: {name} must be [width, height], whole numbers from 1 up, got {shown}"


def join_caption(caption: str | None, tags: str | None, separator: str, wildcard: bool) -> str:
    """The caption for training: the caption, `separator`, the tags; only one of them where the other is missing.

    With `wildcard`, every line of the caption that is not blank is one caption, and each gets the tags. Without, the
    first of them is the caption: what comes behind a line's end is never trained on, and the tags would be lost there.
    Lines of the tags are joined by `separator`.
    """
    lines = _lines(caption)
    joined_tags = separator.join(_lines(tags))
    if not wildcard:
        lines = lines[:1]
    if joined_tags:
        lines = [line + separator + joined_tags for line in lines] or [joined_tags]
    return "\n".join(lines)


def _lines(text: str | None) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if line] if text else []


@collector_paused()
def resolve(
    entries: Mapping[str, Mapping[str, Any]],
    image_dir: Path | None,
    listing: Callable[[Path], Mapping[str, Any]],
    *,
    file: Path,
    separator: str,
    wildcard: bool,
) -> tuple[list[Entry], list[str]]:
    """Finds the image of every key, or its latents; and names, one line each, what was not found.

    A key is a file name or a stem in `image_dir`, or a path. A path is looked for as it stands (relative ones from the
    working directory); then below `image_dir`, by the longest of its ends whose folder is there. So a file that was
    written in another place or on another system keeps working as long as the folders below `image_dir` are the same.

    Every folder is listed at most once, and nothing is asked of the disk for a single key.

    Args:
        entries: checked, as `read_metadata` gives them.
        image_dir: None: every key is a path that can be used as it stands.
        listing: the names of all files of a folder (keys of the mapping); raises OSError.
        file: the metadata file, for the problem lines.
        separator: between caption and tags, see `join_caption`; so is `wildcard`.

    Returns: (entries, problems). Entries are in the order of their folders (by parts, symbolic links followed) and then
        of their names, so that the order in the metadata file doesn't matter. Of several keys for one image the
        first one of the file counts, and the others are problems. Problems are in the order of the file.

    Raises: UserError: `image_dir` is needed and cannot be read.
    """
    places = _Places(image_dir, listing)
    first: dict[tuple[tuple[str, ...], str], Entry] = {}
    problems = []
    for key, said in entries.items():
        found = places.find(key)
        if isinstance(found, str):
            problems.append(f"{file}: {found}")
            continue
        address = (found.folder.order, found.image or found.stem)
        if address in first:
            where = os.path.join(found.folder.path, address[1])
            problems.append(f"{file}: '{first[address].key}' and '{key}' are both {where}; remove one of them")
            continue
        folder = found.folder.path
        first[address] = Entry(
            key=key,
            image=None if found.image is None else folder / found.image,
            base=folder / found.stem,
            caption=join_caption(said.get("caption"), said.get("tags"), separator, wildcard),
            captioned=said.get("caption") is not None or said.get("tags") is not None,
            tags=said.get("tags"),
            image_size=as_size(said.get("image_size")),
            train_resolution=as_size(said.get("train_resolution")),
        )
    return [entry for _, entry in sorted(first.items())], problems


class _Found(NamedTuple):
    folder: _Folder
    image: str | None  # file name
    stem: str


def _stem(image: str) -> str:
    return image.rpartition(".")[0]


@dataclass
class _Folder:
    """The files of one folder by name and, as soon as one is asked for, by stem."""

    path: Path
    names: Mapping[str, Any]
    failure: str | None  # why it could not be listed

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Compares folders alike on every system, and is one for all spellings of a folder."""
        return Path(os.path.realpath(self.path)).parts

    @cached_property
    def images(self) -> dict[str, tuple[str, ...]]:
        """The file names of images by stem."""
        found: dict[str, tuple[str, ...]] = {}
        for name in filter(is_image, self.names):
            stem = _stem(name)
            found[stem] = (*found.get(stem, ()), name)
        return found

    @cached_property
    def latents(self) -> frozenset[str]:
        """Stems that cache files start with."""
        caches = [name for name in self.names if name.endswith(".npz")]
        matches = map(_CACHE.fullmatch, caches)
        return frozenset([name.removesuffix(".npz") for name in caches] + [match[1] for match in matches if match])

    def images_of(self, name: str) -> Sequence[str]:
        """The file of this name, or else all with this stem. The extension may differ in case."""
        if "." in name and is_image(name):
            if name in self.names:
                return (name,)
            stem = _stem(name)
            same = [other for other in self.images.get(stem, ()) if other.lower() == name.lower()]
            if same:
                return same
        return self.images.get(name, ())


class _Places:
    """The folders that a key may mean, the best first. Each is listed once, however many keys name it."""

    def __init__(self, image_dir: Path | None, listing: Callable[[Path], Mapping[str, Any]]):
        self.image_dir = image_dir
        self._listing = listing
        self._folders: dict[str, _Folder] = {}
        self._below: dict[str, _Folder] = {}

    def find(self, key: str) -> _Found | str:
        """The image or latents that a key names, or why there are none. Images in any place go before latents."""
        for folder, name in self._of(key):
            images = folder.images_of(name)
            if len(images) > 1:
                return f"'{key}' may be {' or '.join(sorted(images))} in {folder.path}; write it with its extension"
            if images:
                return _Found(folder, images[0], _stem(images[0]))
        for folder, name in self._of(key):
            stem = _stem(name) if is_image(name) else name
            # Where another image has this stem, the latents are that image's.
            if stem in folder.latents and stem not in folder.images:
                return _Found(folder, None, stem)
        advice = "" if self.image_dir else "; say where the images are with --train_data_dir, or image_dir"
        return f"no image for '{key}' in {folder.path}{advice}"

    def _of(self, key: str) -> Iterator[tuple[_Folder, str]]:
        """(folder, file name or stem), at least one."""
        head, name = os.path.split(key)
        for folder in self._candidates(head):
            yield folder, name
        if "\\" in name:  # a Windows path on another system, where a backslash may be part of a name
            head, name = ntpath.split(key)
            for folder in self._candidates(head.replace("\\", "/")):
                yield folder, name

    def _candidates(self, head: str) -> Iterator[_Folder]:
        if head or self.image_dir is None:
            yield self._folder(head)
        if self.image_dir is not None:
            if head not in self._below:
                self._below[head] = self._below_image_dir(head, self.image_dir)
            yield self._below[head]

    def _below_image_dir(self, head: str, image_dir: Path) -> _Folder:
        """The folder that the longest end of `head` names there.

        An image that is missing in it is not looked for further up: another one may have the same name.
        """
        parts = [part for part in re.split(r"[\\/]", ntpath.splitdrive(head)[1]) if part not in ("", ".")]
        for start in range(len(parts)):
            folder = self._folder(os.path.join(image_dir, *parts[start:]))
            if folder.failure is None:
                return folder
        folder = self._folder(str(image_dir))
        if folder.failure is not None:
            raise UserError(f"{image_dir}: the folder of the images cannot be read ({folder.failure})")
        return folder

    def _folder(self, place: str) -> _Folder:
        if place not in self._folders:
            self._folders[place] = self._list(Path(place))
        return self._folders[place]

    def _list(self, path: Path) -> _Folder:
        try:
            return _Folder(path, self._listing(path), None)
        except (OSError, ValueError) as error:  # ValueError: a key with a null character
            return _Folder(path, {}, getattr(error, "strerror", None) or str(error))
