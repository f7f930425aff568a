"""Options of the scripts that write captions with a model that looks at the images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options.base import OptionGroup, Options, opt
from library.options.preparation import ending_problems, ending_warnings

if TYPE_CHECKING:
    from library.types import FamilyTraits

BLIP_WEIGHTS = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_large_caption.pth"
GIT_MODEL = "microsoft/git-large-textcaps"


@dataclass(frozen=True, kw_only=True)
class CaptionFileOptions(OptionGroup, group="caption", title="Captions"):
    """The images, the files of their captions, and the batch size."""

    train_data_dir: str | None = opt(None, "folder of the images", exists="folder", positional=True)
    caption_extension: str = opt(".caption", "extension of the caption files, which are written beside the images")
    recursive: bool = opt(False, "include sub-folders")
    skip_existing: bool = opt(False, "skip images that already have a caption file")
    batch_size: int = opt(1, "images per batch; more is faster and takes more memory", at_least=1)
    max_data_loader_n_workers: int | None = opt(
        None, "threads that read images ahead; chosen automatically if not given", at_least=0
    )
    debug: bool = opt(False, "print every image's path and caption")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from ending_problems(self.caption_extension)

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from ending_warnings(self.caption_extension)


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(CaptionFileOptions):
    caption_weights: str = opt(
        BLIP_WEIGHTS,
        "BLIP model: hub id, folder, or the original .pth as a file or as a URL, from which it is downloaded once",
    )
    model: str | None = opt(
        None,
        "another model in place of BLIP: hub id or folder of any image-text-to-text model of transformers "
        "(BLIP-2, Florence-2, Qwen-VL, ...)",
    )
    prompt: str | None = opt(
        None,
        'question for the model, or text that it continues, e.g. "Describe this image."; BLIP continues '
        '"a picture of" if not given',
    )
    caption_extention: str | None = opt(
        None,
        "misspelt form of --caption_extension",
        alias_of="caption_extension",
        deprecated="--caption_extension",
    )
    beam_search: bool = opt(False, "use beam search with --num_beams instead of sampling")
    num_beams: int = opt(1, "number of beams of --beam_search; 1 means greedy search", at_least=1)
    top_p: float = opt(
        0.9,
        "nucleus sampling: sample from the likeliest tokens with this total probability; with --model "
        "only where given (greedy search otherwise)",
        above=0,
        at_most=1,
    )
    max_length: int = opt(75, "maximum caption length in tokens; for BLIP including the prompt", at_least=1)
    min_length: int = opt(5, "minimum caption length in tokens; for BLIP including the prompt", at_least=0)
    seed: int = opt(42, "seed of the sampling; an image's caption does not depend on order or batches")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().check(opts, traits)
        if self.min_length > self.max_length:
            yield f"--min_length {self.min_length} is more than --max_length {self.max_length}"
        if self.model is not None and "caption_weights" in opts.explicit:
            yield "--model and --caption_weights name two models; give one of them"

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().warnings(opts, traits)
        if self.num_beams > 1 and not self.beam_search:
            yield "--num_beams has no effect without --beam_search"
        if self.beam_search and "top_p" in opts.explicit:
            yield "--top_p has no effect with --beam_search"


@dataclass(frozen=True, kw_only=True)
class GitCaptionOptions(CaptionFileOptions):
    model_id: str = opt(GIT_MODEL, "GIT model: hub id or folder")
    max_length: int = opt(50, "maximum caption length in tokens", at_least=1)
    remove_words: bool = opt(
        False, 'remove mentions of text in the image, e.g. "with the words ...", from the captions'
    )
