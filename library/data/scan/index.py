"""Facts about files, kept between runs, so that a start looks only into files that are new or have changed.

A fact is a value of a `kind` ("size", "caption", "digest") that follows from the bytes of one file. It holds while the
file's size and modification time stay as they are.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from itertools import chain
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from library.runtime.documents import load_json
from library.runtime.durable import discard_abandoned, replacing
from library.runtime.files import read_bytes
from library.runtime.logs import LOGGER, progress
from library.runtime.signals import leave_interrupts_to_the_parent

Stamp = tuple[int, int]  # bytes, and the modification time in ns
Entry = list[Any]

VERSION = 5  # of the index files; raise it when a kind of facts gets another meaning
MANY = 2000  # unknown files from which worker processes, which take half a second to start, pay off
CHUNK = 64  # files handed to a worker at a time

_SECOND = 10**9
_COARSEST_CLOCK = 2 * _SECOND  # FAT rounds modification times to this
_CLOCKS_DIFFER_BY = 24 * 3600 * _SECOND  # at most, between this machine and a file server
_UNKNOWN = object()


class FileIndex:
    """Facts about files that hold for as long as a file's size and modification time do, kept between runs.

    A run sees one state of each file: the one at its first look, or at the last `put`. Many processes may use one
    place; the last to save wins, which costs the others' facts to be found again. Not for several threads at once.
    """

    def __init__(self, place: Path | None):
        """
        Args:
            place: folder for the index files, one for each folder that is scanned; None: nothing is kept.
        """
        self._place = place
        self._folders: dict[str, _Folder] = {}  # by resolved path
        self._spellings: dict[str, _Folder] = {}  # by path as given, because resolving is slow
        self._workers = _Workers()
        self._warned = False

    @contextmanager
    def many_questions(self) -> Iterator[None]:
        """Inside, worker processes stay for the next `learn`: starting them takes half a second."""
        self._workers.stay = True
        try:
            yield
        finally:
            self._workers.stay = False
            self._workers.stop()

    def listing(self, folder: Path) -> dict[str, Stamp]:
        """The files of a folder, {name: (bytes, mtime in ns)}, as they were at the first call for it in this run.

        Folders are left out. A link that leads nowhere is listed as (0, 0).

        Raises: OSError: there is no such folder, or it cannot be read.
        """
        known = self._folder(os.fspath(folder))
        if known.listed is None:
            known.list()
        return {name: (entry[0], entry[1]) for name, entry in known.listed.items()}

    def stamp(self, file: Path | str) -> Stamp | None:
        """(bytes, mtime in ns), or None where there is no such file, or none that may be read."""
        folder, name = self._split(file)
        return folder.stamp(name)

    def learn(self, kind: str, files: Sequence[Path | str], compute: Callable[[Path], Any]) -> list[Any]:
        """The facts of a kind for all `files`, in their order. Unknown ones are computed, in parallel.

        Every value has been through JSON, so that it is the same whether it was kept or computed: a tuple becomes a
        list. The values belong to the index and must not be changed. What is learnt before an exception stays learnt.

        Args:
            compute: turns a file into a value that JSON can hold, and expected errors into values too. With `MANY`
                unknown files it runs in other processes if it can be pickled (a function of a module, or a `partial`
                of one), else in threads.

        Raises: whatever `compute` raises. TypeError, ValueError: JSON cannot hold its value.
        """
        values: list[Any] = [None] * len(files)
        unknown: dict[tuple[str, str], list[int]] = {}
        for position, file in enumerate(files):
            folder, name = self._split(file)
            value = folder.fact(name, kind)
            if value is _UNKNOWN:
                unknown.setdefault((folder.path, name), []).append(position)
            else:
                values[position] = value
        if unknown:
            todo = [files[positions[0]] for positions in unknown.values()]
            with closing(self._workers.values(compute, todo, kind)) as batches:
                for value, ((path, name), positions) in zip(chain.from_iterable(batches), unknown.items(), strict=True):
                    self._folders[path].record(name, kind, value)
                    for position in positions:
                        values[position] = value
        return values

    def put(self, kind: str, file: Path, value: Any) -> None:
        """Records a fact that was found elsewhere, right after the file was read or written.

        Other facts about the file are dropped where it has changed in this run. Nothing happens where it is missing.

        Raises: TypeError, ValueError: JSON cannot hold the value.
        """
        folder, name = self._split(file)
        folder.look_again(name)
        folder.record(name, kind, json.loads(json.dumps(value)))

    def save(self) -> None:
        """Writes the index of each folder that has changed. Where that fails, one warning says so."""
        if self._place is None:
            return
        changed = [folder for folder in self._folders.values() if folder.has_changed()]
        discard_abandoned(_index_file(self._place, folder.path) for folder in changed)
        for folder in changed:
            try:
                folder.save(self._place)
            except OSError as error:
                if not self._warned:
                    reason = error.strerror or error
                    LOGGER.warning(f"{self._place}: the file index cannot be kept ({reason}); the next start is slower")
                self._warned = True
                return

    def _split(self, file: Path | str) -> tuple[_Folder, str]:
        head, separator, name = os.fspath(file).rpartition(os.sep)
        parent = head + separator
        return self._spellings.get(parent) or self._folder(parent), name

    def _folder(self, path: str) -> _Folder:
        if path not in self._spellings:
            resolved = os.path.realpath(path or os.curdir)
            if resolved not in self._folders:
                self._folders[resolved] = _Folder(resolved, self._place)
            self._spellings[path] = self._folders[resolved]
        return self._spellings[path]


class _Folder:
    """Facts about the files of one folder.

    An entry is [bytes, mtime in ns, kind, value, kind, value, ...], as in the JSON, where a kind is its place among
    the folder's: a dictionary for each file would take half as much memory again.
    """

    def __init__(self, path: str, place: Path | None):
        self.path = path  # resolved
        self.listed: dict[str, Entry] | None = None  # the entries as they were then; None: not in this run
        self._kinds: list[str] = []
        self._kept: dict[str, Entry] = {} if place is None else self._load(place)
        self._seen: dict[str, Entry] = {}  # in this run; entries of `_kept`, and of `_loose`
        self._loose: set[str] = set()  # names whose facts are good for this run only
        self._changed = False

    def _load(self, place: Path) -> dict[str, Entry]:
        """The entries by file name; none where the index file is missing, damaged or not ours."""
        file = _index_file(place, self.path)
        try:
            with collector_paused():
                content = load_json(unseal(read_bytes(file)))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            LOGGER.info(f"{file}: the file index is rebuilt ({error})")
            return {}
        if isinstance(content, dict) and content.get("version") == VERSION and content.get("folder") == self.path:
            files, kinds = content.get("files"), content.get("kinds")
            if isinstance(files, dict) and _are_texts(kinds) and _are_entries(files.values(), len(kinds)):
                self._kinds = kinds
                return files
        LOGGER.info(f"{file}: the file index is rebuilt (its version or folder differs)")
        return {}

    def list(self) -> None:
        listed = {}
        names = {name: name for name in self._kept}  # one string for each file, and not another one
        now = time.time_ns()
        with collector_paused(), os.scandir(self.path) as entries:
            for entry in entries:
                name = names.get(entry.name, entry.name)
                try:
                    found = entry.stat()
                except OSError:
                    listed[name] = [0, 0]  # whoever opens it learns why
                    continue
                if not stat.S_ISDIR(found.st_mode):
                    listed[name] = self._seen.get(name) or self._see(name, found, now)
        self.listed = listed

    def stamp(self, name: str) -> Stamp | None:
        entry = self._seen.get(name) or self._look(name)
        return None if entry is None else (entry[0], entry[1])

    def look_again(self, name: str) -> None:
        before = self._seen.pop(name, None)
        now = self._look(name)
        if before is not None and (now is None or before[:2] != now[:2]):
            self._forget(name)
            if now is not None:
                # The caller has written it, or another program has since the caller read it.
                self._loose.add(name)

    def fact(self, name: str, kind: str) -> Any:
        """The value, or `_UNKNOWN`."""
        entry = self._seen.get(name) or self._look(name)
        place = None if entry is None else self._place_of(entry, kind)
        return _UNKNOWN if place is None else entry[place]

    def record(self, name: str, kind: str, value: Any) -> None:
        entry = self._seen.get(name)
        if entry is None:
            return
        place = self._place_of(entry, kind)
        if place is not None:
            entry[place] = value
        else:
            if kind not in self._kinds:
                self._kinds.append(kind)
            entry += (self._kinds.index(kind), value)
        if name not in self._loose:
            self._kept[name] = entry
            self._changed = True

    def has_changed(self) -> bool:
        if self.listed is not None:
            for name in self._kept.keys() - self._seen.keys():
                self._forget(name)
        return self._changed

    def save(self, place: Path) -> None:
        content = {"version": VERSION, "folder": self.path, "kinds": self._kinds, "files": self._kept}
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
        with replacing(_index_file(place, self.path), flush=False) as temporary:
            temporary.write_bytes(seal(text.encode("utf-8", "surrogatepass")))  # file names need not be Unicode
        self._changed = False

    def _place_of(self, entry: Entry, kind: str) -> int | None:
        """Where in an entry the value of a kind is."""
        for place in range(2, len(entry), 2):
            if self._kinds[entry[place]] == kind:
                return place + 1
        return None

    def _look(self, name: str) -> Entry | None:
        now = time.time_ns()
        try:
            found = os.stat(os.path.join(self.path, name))
        except (OSError, ValueError):
            return None
        return None if stat.S_ISDIR(found.st_mode) else self._see(name, found, now)

    def _see(self, name: str, found: os.stat_result, now: int) -> Entry:
        """Notes the state of a file that is not yet in `_seen`; `now` is in ns, and not after the look at it."""
        size, changed = found.st_size, found.st_mtime_ns
        entry = self._kept.get(name)
        if entry is None or entry[0] != size or entry[1] != changed:
            self._forget(name)
            entry = [size, changed]
            if -_COARSEST_CLOCK < changed - now < _CLOCKS_DIFFER_BY:
                # It may change once more without a change of its stamp, where the clock of the file system is coarse.
                self._loose.add(name)
        self._seen[name] = entry
        return entry

    def _forget(self, name: str) -> None:
        self._loose.discard(name)
        if self._kept.pop(name, None) is not None:
            self._changed = True


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses garbage collection while many permanent objects are made, which saves a quarter of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _are_texts(kinds: Any) -> bool:
    return type(kinds) is list and all(type(kind) is str for kind in kinds)


def _are_entries(values: Iterable[Any], kinds: int) -> bool:
    """Whether all are entries, see `_Folder`, of so many kinds."""
    known = set(range(kinds))
    return all(
        type(one) is list
        and len(one) >= 2
        and len(one) % 2 == 0
        and type(one[0]) is type(one[1]) is int
        and all(type(kind) is int and kind in known for kind in one[2::2])
        for one in values
    )


def _index_file(place: Path, folder: str) -> Path:
    return place / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json"


def seal(content: bytes) -> bytes:
    """Puts a line with the SHA-256 before it: a fact with one wrong bit would still look like a fact."""
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def unseal(sealed: bytes) -> bytes:
    """The reverse of `seal`. Raises: ValueError: a byte has changed."""
    checksum, _, content = sealed.partition(b"\n")
    if checksum != hashlib.sha256(content).hexdigest().encode():
        raise ValueError("the checksum is wrong")
    return content


class _Workers:
    """Processes that compute, started when there is something for them."""

    def __init__(self) -> None:
        self.stay = False  # for the next run
        self._pool: ProcessPoolExecutor | None = None

    def values(self, compute: Callable[[Path], Any], files: Sequence[Path | str], kind: str) -> Iterator[list[Any]]:
        """The values of all files, as JSON gives them back, some at a time and in order; of few files, in threads."""
        cores = available_cores()
        size = max(1, min(CHUNK, len(files) // (4 * cores)))
        chunks = [files[start : start + size] for start in range(0, len(files), size)]
        many = len(files) >= MANY
        ways = [_in_threads]
        if many and cores > 1 and not multiprocessing.current_process().daemon:
            try:
                ForkingPickler.dumps(compute)
                ways = [self.run, _in_threads]
            except Exception as error:  # what cannot be pickled says so by any exception
                LOGGER.debug(f"{compute!r} cannot run in another process ({error})")
        with progress(len(files), f"new files ({kind})", unit="files") if many else nullcontext() as bar:
            done = 0
            for way in ways:
                with closing(way(compute, chunks[done:])) as results:
                    for values in results:
                        done += 1
                        yield values
                        if bar is not None:
                            bar.update(len(values))

    def run(self, compute: Callable[[Path], Any], chunks: Sequence[Sequence[Path | str]]) -> Iterator[list[Any]]:
        """One list for each chunk; ends early where workers cannot be started, one dies, or `compute` fails."""
        whole = False
        try:
            texts = [[os.fspath(file) for file in chunk] for chunk in chunks]  # quicker to send than paths
            results = self._started().map(partial(_attempt, compute), texts)
            for chunk, answer in zip(chunks, results, strict=True):
                values = json.loads(answer)
                if len(values) < len(chunk):
                    return  # to fail again in this process: on their way between two, exceptions lose things
                yield values
            whole = True
        except (OSError, ImportError, NotImplementedError, BrokenProcessPool) as error:
            LOGGER.debug(f"worker processes cannot be used ({error})")
        finally:
            if not (whole and self.stay):
                self.stop()

    def stop(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Not by fork: this process may have threads, or have CUDA in use.
            context = multiprocessing.get_context("spawn")
            count = min(available_cores(), 61)  # more do not work on Windows
            self._pool = ProcessPoolExecutor(count, context, initializer=leave_interrupts_to_the_parent)
        return self._pool


def _in_threads(compute: Callable[[Path], Any], chunks: Sequence[Sequence[Path | str]]) -> Iterator[list[Any]]:
    with ThreadPoolExecutor(available_cores()) as pool:
        for values in pool.map(lambda chunk: [compute(Path(file)) for file in chunk], chunks):
            yield json.loads(json.dumps(values))


def _attempt(compute: Callable[[Path], Any], files: Sequence[str]) -> str:
    """The values of the files before the first that fails, as JSON: making it of many is work for many cores too."""
    values = []
    for file in files:
        try:
            values.append(compute(Path(file)))
        except Exception:
            break
    try:
        return json.dumps(values)
    except (TypeError, ValueError, RecursionError):
        return "[]"


def available_cores() -> int:
    """The number of cores that this process may use, which containers and batch systems limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
