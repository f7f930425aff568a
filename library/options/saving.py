"""What is saved where, how often, and what is written into the file's head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from library.options.base import OptionGroup, Options, opt

if TYPE_CHECKING:
    from library.families.base import FamilyTraits

_HUB = "uploads to Hugging Face"


@dataclass(frozen=True, kw_only=True)
class SavingOptions(OptionGroup, group="saving", title="Saving"):
    output_dir: str | None = opt(None, "folder for everything that the run writes; made if it is missing")
    output_name: str | None = opt(None, "file name without ending of what is saved; last if not given")
    save_model_as: Literal["ckpt", "pt", "safetensors"] | None = opt("safetensors", "file format of what is saved")
    save_precision: Literal["float", "fp16", "bf16"] | None = opt(
        None, "number format of what is saved; that of training if not given"
    )
    save_every_n_epochs: int | None = opt(None, "save a copy every so many epochs", at_least=1, off=0)
    save_every_n_steps: int | None = opt(None, "save a copy every so many optimizer steps", at_least=1, off=0)
    save_n_epoch_ratio: int | None = opt(None, "save about this many copies over the run", at_least=1, off=0)
    save_last_n_epochs: int | None = opt(None, "keep only the last so many epoch copies", at_least=1, off=0)
    save_last_n_steps: int | None = opt(None, "keep only step copies of the last so many steps", at_least=1, off=0)
    save_last_n_epochs_state: int | None = opt(
        None, "keep only the last so many epoch states; as many as copies if not given", at_least=1, off=0
    )
    save_last_n_steps_state: int | None = opt(
        None, "keep only the states of the last so many steps; as copies if not given", at_least=1, off=0
    )
    save_state: bool = opt(False, "save the training state with every copy and at the end, for --resume")
    save_state_on_train_end: bool = opt(False, "save the training state at the end, for --resume")
    resume: str | None = opt(None, "state folder to go on from, exactly where the run was")
    huggingface_repo_id: str | None = opt(None, "repository to upload to", later=_HUB)
    huggingface_repo_type: str | None = opt(None, "kind of that repository: model or dataset", later=_HUB)
    huggingface_path_in_repo: str | None = opt(None, "folder in that repository", later=_HUB)
    huggingface_token: str | None = opt(None, "access token for uploads", later=_HUB, secret=True)
    huggingface_repo_visibility: str | None = opt(None, "public or private, for a new repository", later=_HUB)
    save_state_to_huggingface: bool = opt(False, "upload states too", later=_HUB)
    resume_from_huggingface: bool = opt(False, "--resume names a state on Hugging Face", later=_HUB)
    async_upload: bool = opt(False, "upload while training goes on", later=_HUB)

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if not self.output_dir:
            yield "--output_dir: missing; name the folder to save to"

    def advise(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.save_n_epoch_ratio and self.save_every_n_epochs:
            yield "--save_every_n_epochs: no effect, --save_n_epoch_ratio decides"
        if self.save_last_n_epochs and not (self.save_every_n_epochs or self.save_n_epoch_ratio):
            yield "--save_last_n_epochs: no effect without --save_every_n_epochs"
        if self.save_last_n_steps and not self.save_every_n_steps:
            yield "--save_last_n_steps: no effect without --save_every_n_steps"


@dataclass(frozen=True, kw_only=True)
class MetadataOptions(OptionGroup, group="metadata", title="Metadata"):
    no_metadata: bool = opt(False, "write only the metadata that programs need to load the file")
    metadata_title: str | None = opt(None, "title in the file's metadata; the output name if not given")
    metadata_author: str | None = opt(None, "author in the file's metadata")
    metadata_description: str | None = opt(None, "description in the file's metadata")
    metadata_license: str | None = opt(None, "licence in the file's metadata")
    metadata_tags: str | None = opt(None, "tags in the file's metadata, separated by commas")
    metadata_usage_hint: str | None = opt(None, "usage hint in the file's metadata")
    metadata_thumbnail: str | None = opt(None, "small picture in the file's metadata: an image file or a data: URL")
    metadata_merged_from: str | None = opt(None, "models that this one was merged from, in the file's metadata")
    metadata_trigger_phrase: str | None = opt(None, "words that call up what was trained, in the file's metadata")
    metadata_preprocessor: str | None = opt(None, "preprocessor in the file's metadata")
    metadata_is_negative_embedding: str | None = opt(None, "whether it is a negative embedding, in the file's metadata")
