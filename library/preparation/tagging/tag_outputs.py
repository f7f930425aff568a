"""Where tags go: into a text file beside each image, or all of them into one JSON file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from library.data.scan.metadata_files import read_metadata
from library.errors import UserError
from library.options.tagging import TaggingOptions
from library.preparation.common.images import all_gather, is_first, processes, require_room_beside, warn_of_shared_names
from library.preparation.common.texts import read_lines, require_text_ending, write_text
from library.preparation.metadata.metadata_writer import NOT_UNICODE, is_unicode, require_writable, write_metadata
from library.preparation.tagging.tag_rules import with_appended
from library.runtime.logs import LOGGER
from library.screen import counted
from library.types import Size


class TagPlace(Protocol):
    """The destination of the tags of a run."""

    def has(self, image: Path) -> bool:
        """Whether there are tags for an image from an earlier run."""

    def put(self, image: Path, tags: Sequence[str], size: Size) -> None:
        """Takes the tags of an image. Raises: UserError: they cannot be put there."""

    def finish(self) -> None:
        """Called once by every process, when all images are done. Raises: UserError."""

    def interrupted(self) -> None:
        """Called in place of `finish` when the user stops the run."""


def tag_place(options: TaggingOptions, images: Sequence[Path]) -> TagPlace:
    """The place that the options name, for these images of all processes.

    Raises: UserError: what is there cannot be read, or nothing can be written there.
    """
    if options.output_path is None:
        require_text_ending(options.caption_extension)
        warn_of_shared_names(images, "tag file")
        place = TagFiles(options.caption_extension, options.caption_separator, append=options.append_tags)
        new = (image for image in images if not (options.skip_existing and place.has(image)))
        require_room_beside(new, "tag files")
        return place
    keep = options.skip_existing or options.append_tags
    return OneFile(Path(options.output_path), images, options.caption_separator, options.append_tags, keep)


class TagFiles:
    """``<stem><extension>`` beside each image."""

    def __init__(self, extension: str, separator: str, *, append: bool):
        self._extension, self._separator, self._append = extension, separator, append

    def path_of(self, image: Path) -> Path:
        return image.with_name(image.stem + self._extension)

    def has(self, image: Path) -> bool:
        return os.path.isfile(self.path_of(image))  # Path.is_file raises over names that are too long

    def put(self, image: Path, tags: Sequence[str], size: Size) -> None:
        path, text = self.path_of(image), self._separator.join(tags)
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
    """A `.json` or `.jsonl` file with an entry for each image, by its full path.

    Args:
        images: of all processes, in the order in which they are written.
        keep: what the file says already stays.
    """

    def __init__(self, path: Path, images: Sequence[Path], separator: str, append: bool, keep: bool):
        self._path, self._images, self._separator, self._append = path, images, separator, append
        self._field = "caption" if path.suffix.lower() == ".jsonl" else "tags"
        self._new: dict[str, dict[str, Any]] = {}
        before = read_metadata(path, may_be_empty=True) if keep and path.is_file() else {}
        self._before = {os.path.abspath(key): (key, entry) for key, entry in before.items()}
        self._keep = keep
        if is_first():
            require_writable(path, "--output_path")

    def has(self, image: Path) -> bool:
        _, entry = self._before.get(os.path.abspath(image), ("", {}))
        return entry.get(self._field) is not None

    def put(self, image: Path, tags: Sequence[str], size: Size) -> None:
        full = os.path.abspath(image)
        if not is_unicode(full):
            raise UserError(NOT_UNICODE)
        _, before = self._before.get(full, ("", {}))
        there = before.get(self._field)
        text = self._separator.join(tags)
        if self._append and there is not None:
            text = with_appended(there, tags, self._separator)
        self._new[full] = {**before, self._field: text, "image_size": list(size)}

    def finish(self) -> None:
        new = {full: entry for share in all_gather(self._new) for full, entry in share.items()}
        if is_first():
            self._write(new)

    def interrupted(self) -> None:
        # Several processes are stopped in several places; and a whole file is better than the beginning of another.
        if self._new and processes().world == 1 and (self._keep or not self._path.exists()):
            self._write(self._new)
            LOGGER.info("%s: %s so far; --skip_existing continues from there", self._path, counted(len(self._new)))

    def _write(self, new: dict[str, dict[str, Any]]) -> None:
        entries = {key: new.get(full, entry) for full, (key, entry) in self._before.items()}
        for image in self._images:
            full = os.path.abspath(image)
            if full in new and full not in self._before:
                entries[full] = new[full]
        write_metadata(self._path, entries)
