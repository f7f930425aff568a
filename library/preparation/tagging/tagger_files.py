"""Where a tagger's files are: in a folder here, in the hub's cache, or at Hugging Face, from where they are fetched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from library.errors import UserError
from library.runtime.logs import LOGGER

Kind = Literal["table", "mapping", "list"]

# The file with the labels shows the type of a tagger; usual names of its model come first.
_KINDS: tuple[tuple[str, Kind, tuple[str, ...]], ...] = (
    ("selected_tags.csv", "table", ("model.onnx", "model_optimized.onnx")),
    ("tag_mapping.json", "mapping", ("model_optimized.onnx", "model.onnx")),
    ("tags.txt", "list", ("model.onnx",)),
)
_BESIDE = ("tags-general.txt", "tags-character.txt")  # say which labels of a tags.txt are of which category
_KERAS = (".h5", ".keras", ".pb")


@dataclass(frozen=True)
class TaggerFiles:
    """The local files of a tagger."""

    kind: Kind  # "table": SmilingWolf's; "mapping": one with tag_mapping.json; "list": DeepDanbooru
    folder: Path
    model: str  # names in the folder
    labels: str

    @property
    def path(self) -> Path:
        return self.folder / self.model


@dataclass(frozen=True)
class _Wanted:
    """The repository and folder at the hub that --repo_id names."""

    repo: str  # owner/model
    inside: str  # folder in the repository; "" for its root


def find_tagger(repo_id: str, model_dir: Path, *, force: bool = False) -> TaggerFiles:
    """The files of a tagger, which are fetched if they are not here.

    They are looked for in the folder `repo_id`, if there is one; in `model_dir`/<repo_id with _ for />; in the hub's
    cache. What is fetched goes into the second of these.

    Args:
        force: fetch them, whatever is here.
    Raises: UserError: they are not here and cannot be downloaded, or are of a kind that is not known; or `repo_id` is a
        folder here and `force` is set.
    """
    if Path(repo_id).is_dir():
        if force:
            raise UserError(
                f"--force_download: nothing is downloaded for --repo_id {repo_id}, as it is a local "
                "folder; leave one of the two out, or start from another folder"
            )
        found = _in_folder(Path(repo_id))
        if found is None:
            raise UserError(f"--repo_id: {_what_is_missing(str(Path(repo_id)), _names(Path(repo_id)))}")
        return found
    parts = repo_id.replace("\\", "/").strip("/").split("/")
    if len(parts) < 2 or not all(parts) or ".." in parts or "." in parts:
        raise UserError(f"--repo_id: {repo_id!r} is neither a local folder nor a name of the form owner/model")
    wanted = _Wanted("/".join(parts[:2]), "/".join(parts[2:]))
    folder = model_dir / repo_id.replace("/", "_")
    here = None if force else _at_hand(wanted, folder)
    return here or _fetch(wanted, folder, force)


def _at_hand(wanted: _Wanted, folder: Path) -> TaggerFiles | None:
    for place in dict.fromkeys([folder, folder / wanted.inside]):
        if place.is_dir() and (found := _in_folder(place)):
            return found
    from huggingface_hub import snapshot_download

    try:
        cached = Path(snapshot_download(wanted.repo, local_files_only=True)) / wanted.inside
    except Exception:  # not there; or a name that cannot be: asking the hub shows why
        return None
    found = _in_folder(cached) if cached.is_dir() else None
    if found is not None:
        LOGGER.info("the tagger is in the cache of Hugging Face: %s", found.folder)
    return found


def _in_folder(folder: Path) -> TaggerFiles | None:
    found = recognise(_names(folder), str(folder))
    return found and TaggerFiles(found[0], folder, *found[1:])


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read ({error.strerror})") from None


def recognise(names: Sequence[str], where: str) -> tuple[Kind, str, str] | None:
    """(kind, name of the model, name of the labels) among the files of one folder; None if it holds no whole tagger.

    Raises: UserError: there are several models, and it is unclear which one belongs to the labels.
    """
    models = [name for name in names if name.lower().endswith(".onnx")]
    for labels, kind, usual in _KINDS:
        if labels not in names or not models:
            continue
        named = [name for name in usual if name in models]
        if not named and len(models) > 1:
            raise UserError(f"{where}: there are several models, {', '.join(models)}; leave one, as model.onnx")
        return kind, (named or models)[0], labels
    return None


def _what_is_missing(where: str, names: Iterable[str]) -> str:
    names = list(names)
    if not any(name.lower().endswith(".onnx") for name in names):
        if any(name.lower().endswith(_KERAS) for name in names):
            return f"{where} has only a Keras model, which is not read here; take a tagger that has a model.onnx"
        return f"{where} has no ONNX model"
    return f"{where} has no selected_tags.csv, tag_mapping.json or tags.txt, which would say what its outputs mean"


def _fetch(wanted: _Wanted, folder: Path, force: bool) -> TaggerFiles:
    from huggingface_hub import HfApi, hf_hub_download

    failure = f"the tagger {wanted.repo} is not in {folder} and cannot be downloaded"
    if force:
        failure = f"the tagger {wanted.repo} cannot be downloaded"
    about = _or_fail(lambda: HfApi().model_info(wanted.repo), failure)
    paths = [PurePosixPath(file.rfilename) for file in about.siblings or ()]
    names = [path.name for path in paths if path.parent == PurePosixPath(wanted.inside)]
    at_hub = f"{wanted.repo}/{wanted.inside}".rstrip("/") + " at Hugging Face"
    found = recognise(names, at_hub)
    if found is None:
        raise UserError(f"--repo_id: {_what_is_missing(at_hub, names)}")
    kind, model, labels = found
    LOGGER.info("downloading the tagger %s into %s", wanted.repo, folder)
    # Weights beyond what one ONNX file can hold lie beside it, under a name that starts with the model's.
    parts = [name for name in names if name != model and (name.startswith(model) or name in (labels, *_BESIDE))]
    for name in [*parts, model]:  # the model last: a folder without one is seen to be not complete
        path = str(PurePosixPath(wanted.inside, name))

        def fetch(path: str = path) -> str:
            return hf_hub_download(wanted.repo, path, local_dir=folder, force_download=force)

        _or_fail(fetch, failure)
    return TaggerFiles(kind, folder / wanted.inside, model, labels)


def _or_fail(ask: Callable[[], Any], failure: str) -> Any:
    try:
        return ask()
    except Exception as error:  # of several packages, one of which changes with the hub client's version
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) if lines else type(error).__name__
        raise UserError(
            f"{failure}: {reason}", hint="get its files in another way, and name the folder that holds them: --repo_id"
        ) from None
