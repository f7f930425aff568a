"""Options of the script that writes tags with a model that looks at the images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.options.base import OptionGroup, Options, opt
from library.options.preparation import ending_problems, ending_warnings

if TYPE_CHECKING:
    from library.types import FamilyTraits

DEFAULT_TAGGER = "SmilingWolf/wd-v1-4-convnext-tagger-v2"
JSON_ENDINGS = (".json", ".jsonl")
_THRESHOLDS = ("general", "character", "meta", "model", "copyright", "artist")  # categories that have one
_BEST = ("rating", "quality")  # and those of which the likeliest is written


def _threshold(kind: str) -> float | None:
    return opt(None, f"threshold of {kind} tags; --thresh if not given", at_least=0)


@dataclass(frozen=True, kw_only=True)
class TaggingOptions(OptionGroup, group="tagging", title="Tagging"):
    train_data_dir: str = opt(None, "folder of images", exists="folder", positional=True)
    repo_id: str = opt(
        DEFAULT_TAGGER,
        "tagger at Hugging Face: owner/model, or owner/model/folder; or a local folder that holds a tagger",
    )
    model_dir: str = opt("wd14_tagger_model", "folder for downloaded taggers, each in its own sub-folder")
    force_download: bool = opt(False, "download the tagger again even if it exists")
    onnx: bool = opt(False, "run the tagger's ONNX file; always done")
    batch_size: int = opt(1, "images per batch; more is faster and takes more memory", at_least=1)
    max_data_loader_n_workers: int | None = opt(
        None, "threads that read images ahead; chosen automatically if not given", at_least=0
    )
    output_path: str | None = opt(
        None, "write all tags into this one .json or .jsonl file, instead of a file beside each image"
    )
    caption_extension: str = opt(".txt", "extension of the tag files, which are written beside the images")
    caption_extention: str | None = opt(
        None,
        "misspelt form of --caption_extension",
        alias_of="caption_extension",
        deprecated="--caption_extension",
    )
    recursive: bool = opt(False, "include sub-folders")
    skip_existing: bool = opt(False, "skip images that already have tags")
    append_tags: bool = opt(False, "keep existing tags, and add those that are missing")
    thresh: float = opt(
        0.35,
        "write tags with at least this probability; a lower value gives more tags, and more wrong ones",
        at_least=0,
    )
    general_threshold: float | None = _threshold("general")
    character_threshold: float | None = _threshold("character")
    meta_threshold: float | None = _threshold("meta")
    model_threshold: float | None = _threshold("model")
    copyright_threshold: float | None = _threshold("copyright")
    artist_threshold: float | None = _threshold("artist")
    undesired_tags: str = opt("", "tags that are never written, separated by commas")
    always_first_tags: str | None = opt(
        None, "tags that are moved to the front where they are found, separated by commas; the last of them comes first"
    )
    tag_replacement: str | None = opt(
        None, 'tags to write in place of others: "old,new;old,new"; a comma or semicolon in a tag is written \\, or \\;'
    )
    remove_underscore: bool = opt(False, "write spaces for the underscores in tags; faces such as ^_^ stay as they are")
    character_tag_expand: bool = opt(
        False, "split the tag of a character with a series into two: name_(series) becomes name, series"
    )
    character_tags_first: bool = opt(False, "write character tags before the others")
    use_rating_tags: bool = opt(False, "write the rating, as the first tag")
    use_rating_tags_as_last_tag: bool = opt(False, "write the rating, as the last tag")
    use_quality_tags: bool = opt(False, "write the quality, as the first tag, where the tagger knows qualities")
    use_quality_tags_as_last_tag: bool = opt(
        False, "write the quality, as the last tag, where the tagger knows qualities"
    )
    caption_separator: str = opt(", ", "text between two tags")
    frequency_tags: bool = opt(False, "print how often each tag was found, the most frequent first")
    debug: bool = opt(False, "print every image's path and tags with their probabilities")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from ending_problems(self.caption_extension)
        if not self.caption_separator:
            yield "--caption_separator must not be empty"
        if self.output_path is not None and Path(self.output_path).suffix.lower() not in JSON_ENDINGS:
            yield f"--output_path must end in .json or .jsonl, got {self.output_path!r}"
        if self.skip_existing and self.append_tags:
            yield "--skip_existing skips images that have tags and --append_tags adds to them; use one of them"
        if self._writes_nothing():
            yield f"--thresh: no tag has a probability above 1, so none would be written, got {self.thresh}"

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from ending_warnings(self.caption_extension)
        for name in _BEST:
            if getattr(self, f"use_{name}_tags") and getattr(self, f"use_{name}_tags_as_last_tag"):
                yield f"--use_{name}_tags_as_last_tag has no effect with --use_{name}_tags"
        if self.output_path is not None and {"caption_extension", "caption_extention"} & opts.explicit:
            yield "--caption_extension has no effect with --output_path"

    def _writes_nothing(self) -> bool:
        """Whether each category is switched off by a threshold above 1, as one or the other may well be."""
        own = [getattr(self, f"{category}_threshold") for category in _THRESHOLDS]
        others = (getattr(self, f"use_{name}_tags{place}") for name in _BEST for place in ("", "_as_last_tag"))
        return min(self.thresh if one is None else one for one in own) > 1 and not any(others)
