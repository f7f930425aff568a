"""Uploads of what a run saves to Hugging Face, and states that come from there."""

from __future__ import annotations

import glob
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Thread

from library.errors import UserError
from library.options.base import Options, options_of
from library.options.saving import SavingOptions, parse_hub_folder
from library.runtime.logs import LOGGER
from library.training.state_notes import EXTRA, MODEL, OPTIMIZER, PROGRESS, SCALER, SCHEDULE

_OF_A_STATE = (MODEL, OPTIMIZER, SCHEDULE, SCALER, EXTRA, PROGRESS)  # nothing else is fetched, least of all pickles


class Hub:
    """Uploads to the repository of the options; does nothing without one.

    Nothing here raises: an upload that fails is warned about, and the file is still on the disk. Uploads happen one
    after another; with --async_upload in a thread, so that training continues. As a context manager it waits for them.
    """

    def __init__(self, options: SavingOptions, enabled: bool = True):
        self._options = options
        self._enabled = enabled and options.huggingface_repo_id is not None
        self._made = False  # the repository is there
        self._pending: dict[Path, Future[None]] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="upload")
        if self._enabled:
            made = self._worker.submit(self._try, self._make_repository, options.huggingface_repo_id)
            if not options.async_upload:
                made.result()

    def upload(self, path: Path) -> None:
        """Uploads a file or folder under its own name, into --huggingface_path_in_repo."""
        if not self._enabled:
            return
        self._pending[path] = self._worker.submit(self._try, lambda: self._upload(path), str(path))
        if not self._options.async_upload:
            self.settle(path)

    def upload_state(self, folder: Path) -> None:
        """Uploads a state where --save_state_to_huggingface asks for it."""
        if self._options.save_state_to_huggingface:
            self.upload(folder)

    def settle(self, path: Path) -> None:
        """Waits until `path` is uploaded, if it is waiting for that: before it is deleted or written again."""
        pending = self._pending.pop(path, None)
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits until all uploads are done."""
        unfinished = sum(not pending.done() for pending in self._pending.values())
        if unfinished:
            LOGGER.info("waiting for %d upload%s to Hugging Face", unfinished, "" if unfinished == 1 else "s")
        for path in list(self._pending):
            self.settle(path)
        self._worker.shutdown()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, Exception):  # Ctrl-C: only what is on its way
            self._worker.shutdown(cancel_futures=True)
        else:
            self.close()

    def _try(self, work: Callable[[], None], what: str) -> None:
        try:
            work()
        except Exception as error:  # whatever it is, it is no reason to stop training
            LOGGER.warning("upload to Hugging Face failed: %s: %s", what, _reason(error))

    def _make_repository(self) -> None:
        _make_repository(self._options)
        self._made = True

    def _upload(self, path: Path) -> None:
        if not self._made:
            self._make_repository()
        folder = _place_in_repository(self._options)
        _send(self._options, path, f"{folder}/{path.name}" if folder else path.name)
        LOGGER.info("uploaded %s to %s at Hugging Face", path.name, self._options.huggingface_repo_id)


def upload(args: Namespace, src: str | Path, dest_suffix: str = "", force_sync_upload: bool = False) -> None:
    """Uploads a file, or what is in a folder, for programs that have trained with the scripts.

    An upload that fails is warned about.

    Args:
        args: the `huggingface_` options; those that are missing have no value.
        dest_suffix: put behind --huggingface_path_in_repo: together they are the file's or folder's place.
        force_sync_upload: waits for the end of the upload, which runs in a thread with --async_upload only.
    """
    values = {option.dest: getattr(args, option.dest, option.default) for option in options_of(SavingOptions)}
    options = SavingOptions(**values)

    def work() -> None:
        try:
            _make_repository(options)
            _send(options, Path(src), (_place_in_repository(options) + dest_suffix).strip("/"))
            LOGGER.info("uploaded %s to %s at Hugging Face", src, options.huggingface_repo_id)
        except Exception as error:  # whatever it is, what was trained is still on the disk
            LOGGER.warning("upload to Hugging Face failed: %s: %s", src, _reason(error))

    if options.async_upload and not force_sync_upload:
        Thread(target=work).start()
    else:
        work()


def _make_repository(options: SavingOptions) -> None:
    from huggingface_hub import HfApi

    HfApi().create_repo(
        options.huggingface_repo_id,
        token=options.huggingface_token,
        repo_type=options.huggingface_repo_type,
        private=options.huggingface_repo_visibility != "public",
        exist_ok=True,
    )


def _place_in_repository(options: SavingOptions) -> str:
    return (options.huggingface_path_in_repo or "").replace("\\", "/").strip("/")


def _send(options: SavingOptions, path: Path, place: str) -> None:
    from huggingface_hub import HfApi

    common = {
        "repo_id": options.huggingface_repo_id,
        "path_in_repo": place,
        "repo_type": options.huggingface_repo_type,
        "token": options.huggingface_token,
    }
    if path.is_dir():
        HfApi().upload_folder(folder_path=path, **common)
    else:
        HfApi().upload_file(path_or_fileobj=path, **common)


def fetch_state(opts: Options) -> Options:
    """Downloads the state that --resume names, with --resume_from_huggingface; returns options with its local folder.

    What is in the hub's cache already is not downloaded again. Raises: UserError: there is no such state, or the hub
    cannot be reached.
    """
    if not opts.saving.resume_from_huggingface:
        return opts
    from huggingface_hub import HfApi

    wanted = parse_hub_folder(opts.saving.resume)
    LOGGER.info("downloading the state %s of %s from Hugging Face", wanted.path, wanted.repo)
    try:
        snapshot = HfApi().snapshot_download(
            wanted.repo,
            repo_type=wanted.kind,
            revision=wanted.revision,
            allow_patterns=[glob.escape(f"{wanted.path}/{name}") for name in _OF_A_STATE],
            token=opts.saving.huggingface_token,
        )
    except Exception as error:  # of several packages, one of which changes with the hub client's version
        raise UserError(f"--resume: {opts.saving.resume} cannot be downloaded: {_reason(error)}") from None
    folder = Path(snapshot, wanted.path)
    if not folder.is_dir():
        raise UserError(f"--resume: there is no state {wanted.path} in {wanted.repo} at Hugging Face")
    return opts.replaced(resume=str(folder), resume_from_huggingface=False)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
