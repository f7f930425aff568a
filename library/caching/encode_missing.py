"""What caches lack: encoded in batches while the next are read, and written while the next are encoded."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from library.errors import NameTooLongError, UserError
from library.runtime import logs
from library.runtime.durable import discard_abandoned, flush_file_systems
from library.runtime.logs import LOGGER
from library.runtime.processes import Processes

Job = TypeVar("Job")
Loaded = TypeVar("Loaded")
Result = TypeVar("Result")

OnError = Callable[[Path, str], None]  # (image, why nothing can be cached for it)

MOST_NAMED = 20  # files that are encoded again, or in the way, are named up to so many


@dataclass(frozen=True)
class Encoder:
    """Encodes batches; also the batch size, the seed, and the processes that share the work."""

    encode: Callable[..., Any]  # see `latents.Encode` and `text.Encode`
    batch_size: int
    seed: int = 0  # of draws from the VAE's posterior
    processes: Processes = field(default_factory=Processes)
    progress: Callable[..., Any] = logs.progress
    workers: int | None = None  # threads that read ahead; None: one per processor, up to 8


def batches(jobs: Sequence[Job], size: int, key: Callable[[Job], Any] = lambda _: None) -> Iterator[list[Job]]:
    """Runs of jobs with one key, cut to `size`."""
    group: list[Job] = []
    for job in jobs:
        if group and (len(group) == size or key(group[0]) != key(job)):
            yield group
            group = []
        group.append(job)
    if group:
        yield group


def encode_missing(
    groups: Sequence[list[Job]],
    load: Callable[[Job], Loaded],
    encode: Callable[[list[Job], list[Loaded]], Sequence[Result | UserError]],
    bar: Any,
    *,
    workers: int | None = 0,
    on_error: Callable[[Job, UserError], None] | None = None,
    count: Callable[[Job], int] = lambda _: 1,
) -> Iterator[tuple[Job, Result]]:
    """Jobs and their results, in order.

    Args:
        groups: what is encoded together.
        load: reads what one job needs, in threads and ahead of `encode`. Raises: UserError.
        encode: one result per job, or the error of that job alone.
        bar: a progress bar; `count` is what a job moves it by.
        workers: threads; 0: `load` runs when its result is needed; None: one per processor, up to 8.
        on_error: gets every job that fails; None: the first batch with one raises UserError.
    """
    window = 2 * max(map(len, groups), default=0)
    with bar as bar, closing(_ahead(load, chain.from_iterable(groups), window, workers)) as loaded:
        for group in groups:
            usable = _successes(group, [next(loaded) for _ in group], on_error)
            if usable:
                jobs = [job for job, _ in usable]
                yield from _successes(jobs, encode(jobs, [one for _, one in usable]), on_error)
            bar.update(sum(map(count, group)))


def _successes(
    jobs: Sequence[Job], results: Sequence[Any], on_error: Callable[[Job, UserError], None] | None
) -> list[tuple[Job, Any]]:
    pairs = list(zip(jobs, results, strict=True))
    failed = [(job, one) for job, one in pairs if isinstance(one, UserError)]
    if failed and on_error is None:
        raise UserError(*(problem for _, error in failed for problem in error.problems), hint=failed[0][1].hint)
    for job, error in failed:
        on_error(job, error)
    return [(job, one) for job, one in pairs if not isinstance(one, UserError)]


def _ahead(
    load: Callable[[Job], Loaded], todo: Iterable[Job], window: int, threads: int | None
) -> Iterator[Loaded | UserError]:
    """Results in order, computed in threads; at most `window` plus one per thread are waiting, to bound memory."""

    def attempt(job: Job) -> Loaded | UserError:
        try:
            return load(job)
        except UserError as error:
            return error

    if threads == 0:
        yield from map(attempt, todo)
        return
    threads = threads or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for job in todo:
                waiting.append(pool.submit(attempt, job))
                if len(waiting) >= window + threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def write_files(
    todo: Iterable[tuple[Job, Path, Callable[[], Result]]],
    files: Iterable[Path],
    most_waiting: int,
    on_error: Callable[[Job, UserError], None] | None = None,
) -> dict[Job, Result]:
    """Runs writes in order, in a thread, while `todo` computes what follows. What was computed is written if it fails.

    Args:
        todo: (job, its file, what writes it).
        files: all that will be written; what a killed run has left of them is removed.
        on_error: gets jobs whose file would have too long a name; None: these raise.

    Raises: UserError: a file cannot be written.
    """
    files = list(files)
    discard_abandoned(files)
    written: dict[Job, Result] = {}
    waiting: deque[tuple[Job, Path, Future[Result]]] = deque()

    def settle() -> None:
        job, file, future = waiting.popleft()
        try:
            written[job] = future.result()
        except OSError as error:
            what = f"{file}: the cache file cannot be written ({error.strerror or error})"
            if error.errno != errno.ENAMETOOLONG:
                remedy = "free some space or make the folder writable, or cache in memory"
                raise UserError(what, hint=remedy) from None
            too_long = NameTooLongError(what, hint="shorten the image's name, or cache in memory")
            if on_error is None:
                raise too_long from None
            on_error(job, too_long)

    with ThreadPoolExecutor(max_workers=1) as pool:
        for job, file, write in todo:
            waiting.append((job, file, pool.submit(write)))
            if len(waiting) > most_waiting:
                settle()
        while waiting:
            settle()
    flush_file_systems({file.parent for file in files})
    return written


def report_missing(what: str, kept: int, invalid: Sequence[str], new: int) -> None:
    """Says in the log how many entries are reused, encoded again (named, with the reason) and new."""
    for reason in invalid[:MOST_NAMED]:
        LOGGER.warning("encoded again: %s", reason)
    if len(invalid) > MOST_NAMED:
        LOGGER.warning("encoded again: and %d more", len(invalid) - MOST_NAMED)
    # The words are those that wrappers of such trainers look for.
    counts = ((kept, "used as they are"), (len(invalid), "made again"), (new, "new"))
    LOGGER.info("%s: %s", what, ", ".join(f"{count} {text}" for count, text in counts if count) or "none")
