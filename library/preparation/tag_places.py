"""Where tags go: into a text file beside each picture, or all of them into one JSON file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from library.data.metadata_files import read_metadata
from library.errors import UserError
from library.options.tagging import TaggingOptions
from library.preparation.metadata import NOT_UNICODE, is_unicode, require_writable, write_metadata
from library.preparation.outcome import counted
from library.preparation.pictures import gathered, is_first, processes, require_room_beside, warn_of_shared_names
from library.preparation.tag_rules import with_appended
from library.preparation.texts import read_lines, require_text_ending, write_text
from library.runtime.logs import LOGGER
from library.types import Size


class TagPlace(Protocol):
    """What takes the tags of a run."""

    def has(self, picture: Path) -> bool:
        """Whether there are tags for a picture from an earlier run."""

    def put(self, picture: Path, tags: Sequence[str], size: Size) -> None:
        """Takes the tags of a picture. Raises: UserError: they cannot be put there."""

    def finish(self) -> None:
        """Called once by every process, when all pictures are done. Raises: UserError."""

    def interrupted(self) -> None:
        """Called in place of `finish` when the user stops the run."""


def tag_place(options: TaggingOptions, pictures: Sequence[Path]) -> TagPlace:
    """The place that the options name, for these pictures of all processes.

    Raises: UserError: what is there cannot be read, or nothing can be written there.
    """
    if options.output_path is None:
        require_text_ending(options.caption_extension)
        warn_of_shared_names(pictures, "tag file")
        place = TagFiles(options.caption_extension, options.caption_separator, append=options.append_tags)
        new = (picture for picture in pictures if not (options.skip_existing and place.has(picture)))
        require_room_beside(new, "tag files")
        return place
    keep = options.skip_existing or options.append_tags
    return OneFile(Path(options.output_path), pictures, options.caption_separator, options.append_tags, keep)


class TagFiles:
    """``<stem><extension>`` beside each picture."""

    def __init__(self, extension: str, separator: str, *, append: bool):
        self._extension, self._separator, self._append = extension, separator, append

    def path_of(self, picture: Path) -> Path:
        return picture.with_name(picture.stem + self._extension)

    def has(self, picture: Path) -> bool:
        return os.path.isfile(self.path_of(picture))  # Path.is_file raises over names that are too long

    def put(self, picture: Path, tags: Sequence[str], size: Size) -> None:
        path, text = self.path_of(picture), self._separator.join(tags)
        if self._append and os.path.isfile(path):
            before = read_lines(path)
            text = with_appended(before, tags, self._separator)
            if text == before:
                return
        write_text(path, f"{text}\n")

    def finish(self) -> None:
        pass

    def interrupted(self) -> None:
        pass


class OneFile:
    """A `.json` or `.jsonl` file with an entry for each picture, by its full path.

    Args:
        pictures: of all processes, in the order in which they are written.
        keep: what the file says already stays.
    """

    def __init__(self, path: Path, pictures: Sequence[Path], separator: str, append: bool, keep: bool):
        self._path, self._pictures, self._separator, self._append = path, pictures, separator, append
        self._field = "caption" if path.suffix.lower() == ".jsonl" else "tags"
        self._new: dict[str, dict[str, Any]] = {}
        before = read_metadata(path, may_be_empty=True) if keep and path.is_file() else {}
        self._before = {os.path.abspath(key): (key, entry) for key, entry in before.items()}
        self._keep = keep
        if is_first():
            require_writable(path, "--output_path")

    def has(self, picture: Path) -> bool:
        _, entry = self._before.get(os.path.abspath(picture), ("", {}))
        return entry.get(self._field) is not None

    def put(self, picture: Path, tags: Sequence[str], size: Size) -> None:
        full = os.path.abspath(picture)
        if not is_unicode(full):
            raise UserError(NOT_UNICODE)
        _, before = self._before.get(full, ("", {}))
        there = before.get(self._field)
        text = self._separator.join(tags)
        if self._append and there is not None:
            text = with_appended(there, tags, self._separator)
        self._new[full] = {**before, self._field: text, "image_size": list(size)}

    def finish(self) -> None:
        new = {full: entry for share in gathered(self._new) for full, entry in share.items()}
        if is_first():
            self._write(new)

    def interrupted(self) -> None:
        # Several processes are stopped in several places; and a whole file is better than the beginning of another.
        if self._new and processes().world == 1 and (self._keep or not self._path.exists()):
            self._write(self._new)
            LOGGER.info("%s: %s so far; --skip_existing goes on from there", self._path, counted(len(self._new)))

    def _write(self, new: dict[str, dict[str, Any]]) -> None:
        entries = {key: new.get(full, entry) for full, (key, entry) in self._before.items()}
        for picture in self._pictures:
            full = os.path.abspath(picture)
            if full in new and full not in self._before:
                entries[full] = new[full]
        write_metadata(self._path, entries)
