"""Options of the scripts that merge captions and tags into a metadata file, and clean it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options.base import OptionGroup, Options, opt

if TYPE_CHECKING:
    from library.types import FamilyTraits

_ENDING = "extension of the {} files, which replaces that of the image"


@dataclass(frozen=True, kw_only=True)
class MergeOptions(OptionGroup, group="merge", title="Metadata"):
    train_data_dir: str = opt(None, "folder of images", positional=True, exists="folder")
    out_json: str = opt(None, "metadata file to write (.json or .jsonl)", positional=True)
    in_json: str | None = opt(
        None, "metadata file to start from; if not given, the file to write, where it exists", exists="file"
    )
    caption_extension: str = opt(".caption", _ENDING.format("caption"))
    full_path: bool = opt(False, "identify images by their full path in the metadata; for several folders")
    recursive: bool = opt(False, "include sub-folders; needs --full_path")
    debug: bool = opt(False, "print each image with what is written about it")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.recursive and not self.full_path:
            yield "--recursive: needs --full_path, as images in several folders may have the same name"
        if not self.caption_extension.strip():
            yield "--caption_extension: must not be empty"


@dataclass(frozen=True, kw_only=True)
class MergeCaptionsOptions(MergeOptions):
    caption_extention: str | None = opt(
        None, "misspelt form of --caption_extension", deprecated="--caption_extension", alias_of="caption_extension"
    )


@dataclass(frozen=True, kw_only=True)
class MergeTagsOptions(MergeOptions):
    caption_extension: str = opt(".txt", _ENDING.format("tag"))


@dataclass(frozen=True, kw_only=True)
class CleanOptions(OptionGroup, group="clean", title="Metadata"):
    in_json: str = opt(None, "metadata file to read (.json or .jsonl)", positional=True, exists="file")
    out_json: str = opt(None, "metadata file to write; may be the one that is read", positional=True)
    debug: bool = opt(False, "print each image with what was changed")
