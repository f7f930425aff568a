"""Images of a folder, read ahead by threads and shared out over processes."""

from __future__ import annotations

import os
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

from library.data.scan.folders import is_image, is_other_image
from library.errors import UserError
from library.preparation.common.summary import Outcome
from library.runtime.logs import LOGGER, progress
from library.runtime.processes import Processes

T = TypeVar("T")

_SHOWN = 3  # names in a message about several files
_WORKERS = 8  # the default, at most; decoding scales no further


def find_images(folder: Path, *, recursive: bool) -> list[Path]:
    """The images of a folder, sorted; with `recursive` also those of its sub-folders.

    Hidden sub-folders are left out, as they hold copies and previews. Links to folders are followed, once each.

    Raises: UserError: the folder or one below it cannot be read, or there are no images.
    """
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}")

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: the folder cannot be read ({error.strerror})") from None

    found: list[Path] = []
    others: set[str] = set()
    seen: set[str] = set()
    for place, below, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        below[:] = [name for name in sorted(below) if not name.startswith(".")] if recursive else []
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        found += [Path(place, name) for name in names if is_image(name)]
        others |= {os.path.splitext(name)[1].lower() for name in names if is_other_image(name)}
    if others:
        LOGGER.warning("%s: files of the kinds %s are not read here; left out", folder, ", ".join(sorted(others)))
    if not found:
        raise UserError(f"there are no images in {folder}{' or below it' if recursive else ' itself'}")
    return sorted(found, key=lambda path: path.parts)


def warn_of_shared_names(images: Sequence[Path], kind: str) -> None:
    """Warns of images whose names differ only in the extension, where a file is written beside each.

    Args:
        kind: what is written, e.g. "tag file".
    """
    shared = [stem for stem, count in Counter(path.with_suffix("") for path in images).items() if count > 1]
    if shared:
        more = f" and {len(shared) - _SHOWN} more" if len(shared) > _SHOWN else ""
        LOGGER.warning("images of the same name share a %s: %s%s", kind, ", ".join(map(str, shared[:_SHOWN])), more)


def require_room_beside(paths: Iterable[Path], kind: str) -> None:
    """Checks that files can be made in the folders of these images, before a model is loaded.

    Args:
        kind: what is written there, e.g. "tag files".
    Raises: UserError: no file can be made in some of them.
    """
    problems = {folder: why for folder in sorted({path.parent for path in paths}) if (why := _closed(folder))}
    if problems:
        folder, why = next(iter(problems.items()))
        more = f", nor in {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UserError(
            f"{folder}: {kind} cannot be written in this folder ({why}){more}; make it writable, or work on a copy"
        )


def _closed(folder: Path) -> str | None:
    """Why no file can be made in a folder. One is made to find out, as permissions alone do not show it."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def read_ahead(
    paths: Sequence[Path],
    read: Callable[[Path], T],
    outcome: Outcome,
    *,
    workers: int | None,
    desc: str,
    batch: int = 1,
) -> Iterator[tuple[Path, T]]:
    """Images in the order of `paths`, as `read` makes them; threads are a little ahead of who takes them.

    An image that `read` refuses is named and counted in `outcome`, and the next one follows. A bar shows how many are
    done, the rate, and the remaining time.

    Args:
        read: raises UserError, OSError or ValueError where an image cannot be used. Called in several threads.
        workers: threads; 0 reads when asked, and None takes as many as there are processors, up to 8.
        desc: what is being done, for the bar.
        batch: images that are taken in one go; the next ones are read while these are worked on.
    """
    count = min(_WORKERS, os.cpu_count() or 1) if workers is None else workers
    with progress(len(paths), desc, unit="images", disable=not is_first()) as bar:
        for path, result in _results(paths, read, count, batch):
            try:
                value = result()
            except MemoryError:
                outcome.fail(path, "there is not enough memory for it")
            except (UserError, OSError, ValueError) as error:
                outcome.fail(path, getattr(error, "strerror", None) or str(error) or type(error).__name__)
            else:
                yield path, value
            bar.update()


def _results(
    paths: Iterable[Path], read: Callable[[Path], T], workers: int, batch: int
) -> Iterator[tuple[Path, Callable[[], T]]]:
    """Every path with a call that gives what was read, or raises."""
    if workers == 0:
        for path in paths:
            yield path, lambda path=path: read(path)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        waiting: deque[tuple[Path, Future[T]]] = deque()
        for path in paths:
            waiting.append((path, pool.submit(read, path)))
            if len(waiting) > max(2 * workers, batch):  # what is read and not taken yet stays in memory
                first, future = waiting.popleft()
                yield first, future.result
                del future
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result
            del future
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def processes() -> Processes:
    """This process among those that `accelerate launch` or torchrun has started."""
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def is_first() -> bool:
    """Whether this is the process that writes single files, and reports on the run."""
    return processes().rank == 0


def my_share(paths: Sequence[Path]) -> list[Path]:
    """This process's part of paths that every process lists in the same order.

    Those that differ in nothing but the ending stay together: what is written beside them is one file.
    """
    together: dict[str, list[Path]] = {}
    for path in paths:
        together.setdefault(os.path.splitext(path)[0], []).append(path)
    return [path for group in processes().shard(list(together.values())) for path in group]


def all_gather(value: T) -> list[T]:
    """The value of every process, in their order; each process gets the list, and waits for the last one.

    Raises: UserError: another process has ended before it came here.
    """
    ours = processes()
    if ours.world == 1:
        return [value]
    import torch
    from accelerate import PartialState

    # Connects the processes, once. Left to itself it would take each process without a GPU for the only one.
    PartialState(cpu=not torch.accelerator.is_available())
    try:
        return ours.all_gather(value)
    except RuntimeError as error:  # lost connections are nothing more special
        LOGGER.debug("waiting for the other processes", exc_info=error)
        raise UserError("another process of this run has stopped; its own message says why") from None


def by_the_first(work: Callable[[], T]) -> T | None:
    """Lets the first process do what is done once, while the others wait. They get None.

    Raises: UserError: the first process did. The others leave with its exit status, as one message is enough.
    """
    found, problem = None, None
    if is_first():
        try:
            found = work()
        except UserError as error:
            problem = error
    if any(all_gather(problem is not None)):
        processes().close()
        raise problem or SystemExit(2)
    return found
