"""What is saved where, how often, and what is written into the file's head."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from library.options.base import OptionGroup, Options, opt
from library.runtime.paths import unwritable

if TYPE_CHECKING:
    from library.types import FamilyTraits

_SEPARATORS = tuple(filter(None, (os.sep, os.altsep)))
_REPO_KINDS = ("model", "dataset")
_REPO_ID = re.compile(r"(?!.*(--|\.\.))(?!.*\.git$)(\w[\w.-]*/)?\w([\w.-]{0,94}\w)?", re.ASCII)


@dataclass(frozen=True)
class HubFolder:
    """A folder in a repository at Hugging Face; no revision is its newest."""

    repo: str
    path: str  # with slashes, never empty
    revision: str | None = None
    kind: str = "model"


_UPLOADING = ("huggingface_repo_id",)


@dataclass(frozen=True, kw_only=True)
class SavingOptions(OptionGroup, group="saving", title="Saving"):
    output_dir: str | None = opt(None, "folder for everything that the run writes; created if missing")
    output_name: str | None = opt(None, "name of the saved files, without extension; last if not given")
    save_model_as: Literal["ckpt", "pt", "safetensors"] | None = opt("safetensors", "file format of what is saved")
    save_precision: Literal["float", "fp16", "bf16"] | None = opt(
        None, "dtype of what is saved; that of training if not given"
    )
    save_every_n_epochs: int | None = opt(None, "save a copy every N epochs", at_least=1, off=0)
    save_every_n_steps: int | None = opt(None, "save a copy every N optimizer steps", at_least=1, off=0)
    save_n_epoch_ratio: int | None = opt(None, "save about this many copies during the run", at_least=1, off=0)
    save_last_n_epochs: int | None = opt(
        None,
        "keep only the last N copies saved by epoch",
        at_least=1,
        off=0,
        only_with=("save_every_n_epochs", "save_n_epoch_ratio"),
    )
    save_last_n_steps: int | None = opt(
        None,
        "keep only the copies saved by step that are from the last N steps",
        at_least=1,
        off=0,
        only_with=("save_every_n_steps",),
    )
    save_last_n_epochs_state: int | None = opt(
        None, "keep only the last N states saved by epoch; as many as copies if not given", at_least=1, off=0
    )
    save_last_n_steps_state: int | None = opt(
        None,
        "keep only the states saved by step that are from the last N steps; as for copies if not given",
        at_least=1,
        off=0,
    )
    save_state: bool = opt(False, "save the training state with every copy and at the end, for --resume")
    save_state_on_train_end: bool = opt(False, "save the training state at the end, for --resume")
    resume: str | None = opt(None, "state folder from which to continue a run, exactly where it was")
    huggingface_repo_id: str | None = opt(
        None, "repository at Hugging Face, user/name, to which everything saved is uploaded; created if missing"
    )
    huggingface_repo_type: str | None = opt(
        None, "type of that repository: model or dataset; model if not given", only_with=_UPLOADING
    )
    huggingface_path_in_repo: str | None = opt(
        None, "folder in that repository; its root if not given", only_with=_UPLOADING
    )
    huggingface_token: str | None = opt(
        None,
        "access token for Hugging Face; HF_TOKEN or the stored login if not given",
        secret=True,
        only_with=("huggingface_repo_id", "resume_from_huggingface"),
    )
    huggingface_repo_visibility: str | None = opt(
        None, "public or private, for a repository that the run creates; private if not given", only_with=_UPLOADING
    )
    save_state_to_huggingface: bool = opt(False, "upload the saved states too")
    resume_from_huggingface: bool = opt(
        False, "--resume names a state at Hugging Face: user/name/folder, then :revision or :revision:kind"
    )
    async_upload: bool = opt(False, "upload in the background while training continues", only_with=_UPLOADING)

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if not self.output_dir:
            yield "--output_dir: missing; name the folder to save to"
        elif reason := unwritable(Path(self.output_dir)):
            yield f"--output_dir: nothing can be saved to {self.output_dir}: {reason}"
        name = self.output_name or ""
        leaves = os.path.isabs(name) or os.path.splitdrive(name)[0] or os.pardir in Path(name).parts
        faults = (
            ("\0" in name, "no name of a file has a NUL character"),
            (name.endswith(_SEPARATORS), "must name a file and not a folder"),
            (leaves, "must stay below --output_dir, which names the place"),
        )
        if reason := next((reason for wrong, reason in faults if wrong), None):
            yield f"--output_name: {reason}, got {name!r}"
        if self.huggingface_repo_id:
            yield from self._check_upload()
        if self.save_state_to_huggingface and not self.huggingface_repo_id:
            yield "--save_state_to_huggingface: needs --huggingface_repo_id, the repository to upload to"
        if self.resume_from_huggingface:
            try:
                parse_hub_folder(self.resume)
            except ValueError as error:
                yield f"--resume_from_huggingface: {error}"

    def _check_upload(self) -> Iterable[str]:
        if not _REPO_ID.fullmatch(self.huggingface_repo_id):
            yield f"--huggingface_repo_id: must be user/name, got {self.huggingface_repo_id!r}"
        if self.huggingface_repo_type not in (None, *_REPO_KINDS):
            yield f"--huggingface_repo_type: must be {_either(_REPO_KINDS)}, got {self.huggingface_repo_type!r}"
        if self.huggingface_path_in_repo and ".." in self.huggingface_path_in_repo.replace("\\", "/").split("/"):
            yield f"--huggingface_path_in_repo: must not contain .., got {self.huggingface_path_in_repo!r}"

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.huggingface_repo_id and self.huggingface_repo_visibility not in (None, "public", "private"):
            given = self.huggingface_repo_visibility
            yield f"--huggingface_repo_visibility: {given!r} is not public, so private is used"
        if self.save_n_epoch_ratio and self.save_every_n_epochs:
            yield "--save_every_n_epochs: has no effect with --save_n_epoch_ratio"
        if self.save_state_to_huggingface and not (self.save_state or self.save_state_on_train_end):
            yield "--save_state_to_huggingface: no state is saved without --save_state or --save_state_on_train_end"


def output_place(options: SavingOptions) -> tuple[Path, tuple[str, ...]]:
    """The folder that copies are saved to, and what their names begin with."""
    starts = [options.output_name] if options.output_name else ["last", "epoch", "at"]
    paths = [Path(options.output_dir) / start for start in starts]
    return paths[0].parent, tuple(path.name for path in paths)


def sample_place(options: SavingOptions) -> tuple[Path, str]:
    """The folder that sample images are saved to, and what their names begin with."""
    folder = Path(options.output_dir) / "sample"
    if not options.output_name:
        return folder, ""
    path = folder / options.output_name
    return path.parent, f"{path.name}_"


def parse_hub_folder(text: str | None) -> HubFolder:
    """``user/name/folder[:revision[:kind]]``. Raises: ValueError."""
    if not text:
        raise ValueError("needs --resume user/name/folder[:revision[:kind]]")
    place, *rest = text.split(":")
    user, _, below = place.partition("/")
    name, _, path = below.partition("/")
    path = path.strip("/")
    kind = rest[1] if len(rest) == 2 else "model"
    well_formed = len(rest) <= 2 and all(rest) and _REPO_ID.fullmatch(f"{user}/{name}") and path
    if not well_formed or ".." in path.split("/"):
        raise ValueError(f"--resume must be user/name/folder[:revision[:kind]], got {text!r}")
    if kind not in _REPO_KINDS:
        raise ValueError(f"the kind of repository in --resume must be {_either(_REPO_KINDS)}, got {kind!r}")
    return HubFolder(f"{user}/{name}", path, rest[0] if rest else None, kind)


def _either(choices: tuple[str, ...]) -> str:
    return f"{' or '.join(choices)}"


@dataclass(frozen=True, kw_only=True)
class MetadataOptions(OptionGroup, group="metadata", title="Metadata"):
    no_metadata: bool = opt(False, "write only the metadata that programs need to load the file")
    metadata_title: str | None = opt(None, "title in the file's metadata; the output name if not given")
    metadata_author: str | None = opt(None, "author in the file's metadata")
    metadata_description: str | None = opt(None, "description in the file's metadata")
    metadata_license: str | None = opt(None, "licence in the file's metadata")
    metadata_tags: str | None = opt(None, "tags in the file's metadata, separated by commas")
    metadata_usage_hint: str | None = opt(None, "usage hint in the file's metadata")
    metadata_thumbnail: str | None = opt(None, "small image in the file's metadata: an image file or a data: URL")
    metadata_merged_from: str | None = opt(None, "models that this one was merged from, in the file's metadata")
    metadata_trigger_phrase: str | None = opt(None, "trigger words of what was trained, in the file's metadata")
    metadata_preprocessor: str | None = opt(None, "preprocessor in the file's metadata")
    metadata_is_negative_embedding: str | None = opt(None, "whether the file is a negative embedding, in its metadata")
