"""What the text encoders give for captions that never change: encoded once, before training, into memory or files."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from library.caching import store
from library.caching.stems import shared_stems
from library.data.captions import make_caption
from library.errors import NameTooLongError, UserError
from library.runtime import logs
from library.runtime.durable import discard_abandoned, fitting, flush_file_systems
from library.runtime.processes import Processes
from library.types import TextCond, TextLayout
from library.version import NAME, VERSION

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from library.data.types import Record

Encode = Callable[[list[str]], TextCond]
Arrays = dict[str, "NDArray[Any]"]

_DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")  # that torch has too
_ALONE = Processes()
_NAN = "the text encoder gives NaN or infinite values for its caption"
_SHOWN = 5  # problems of one kind that are told one by one


@dataclass(frozen=True)
class Item:
    """One record, as far as its text is concerned."""

    image: Path
    caption: str  # as training gives it to the encoder
    shared_stem: bool = False  # another image of the folder differs in its extension only
    changed: bool = False  # the caption is not what the caption file says, e.g. it has a prefix
    caption_file: Path | None = None


class TextStore(Protocol):
    """Rows by item, in the order of the items that the store was made for. Picklable, for data workers."""

    def get(self, number: int) -> dict[str, Tensor]:
        """One item's tensors on the CPU, without batch axis. Raises: UserError: its file is gone or broken."""
        ...


@dataclass(frozen=True)
class MemoryStore:
    """Batches as they were encoded, so that pickling copies each once, and the place of every item in them."""

    batches: tuple[TextCond, ...]
    places: tuple[tuple[int, int], ...]  # (batch, row) by item

    def get(self, number: int) -> dict[str, Tensor]:
        batch, row = self.places[number]
        return {name: tensor[row] for name, tensor in self.batches[batch].tensors.items()}


@dataclass(frozen=True)
class DiskStore:
    """Reads the item's file whenever it is asked."""

    files: tuple[Path, ...]  # by item
    keys: tuple[str, ...]

    def get(self, number: int) -> dict[str, Tensor]:
        file = self.files[number]
        try:
            arrays = store.read(file, self.keys)
            why = _not_finite(arrays)  # also in files that were not checked
        except FileNotFoundError:
            why = "it is gone"
        except OSError as error:
            why = error.strerror or str(error)
        except store.CacheDamaged as error:
            why = str(error)
        if why:
            raise UserError(f"{file}: cached text encoder outputs cannot be used ({why}); delete it and start again")
        return {name: torch.from_numpy(arrays[name]) for name in self.keys}


def items_of(records: Sequence[Record]) -> list[Item]:
    """What a cache needs to know of each record. Their captions must not change, see `captions.changing`."""
    shared = shared_stems(records)
    return [
        Item(
            image=record.path if record.present else record.path.with_name(f"{record.path.name}.png"),
            # Nothing is drawn and no step counts, as nothing in the caption changes.
            caption=make_caption(record.caption, record.subset.captions, Random(0), epoch=1, step=0),
            shared_stem=record.path in shared,
            changed=bool(record.subset.captions.caption_prefix or record.subset.captions.caption_suffix),
        )
        for record in records
    ]


def cache_file(item: Item, layout: TextLayout) -> Path:
    """The file of an item's outputs. Where an image shares its stem with another, the extension stays in the name.

    A name that is too long is shortened.
    """
    stem = item.image.name if item.shared_stem else item.image.stem
    return item.image.with_name(fitting(stem, layout.suffix))


def cache_text_in_memory(
    items: Sequence[Item],
    encode: Encode,
    batch_size: int,
    progress: Callable[..., Any] = logs.progress,
    processes: Processes = _ALONE,
) -> MemoryStore:
    """Encodes every different caption once and keeps the outputs in the dtypes that the encoder gives.

    Args:
        encode: up to `batch_size` captions to their conditioning.
        processes: those that share the work; each of them gets all outputs.
        progress: makes a progress bar, as `library.runtime.logs.progress` does.

    Raises: UserError: the encoder gives NaN for a caption.
    """
    owners = {item.caption: item for item in reversed(items)}  # of equal captions, the first item
    captions = list(dict.fromkeys(item.caption for item in items))
    batches: list[TextCond] = []
    places: dict[str, tuple[int, int]] = {}
    with progress(total=len(captions), desc="caching text encoder outputs", unit="caption") as bar:
        groups = _groups(captions, batch_size)
        for start in range(0, len(groups), processes.world):
            together = groups[start : start + processes.world]
            own = _encode_group(together[processes.rank], encode, owners) if processes.rank < len(together) else None
            for group, cond in zip(together, processes.gathered(own), strict=False):
                places.update({caption: (len(batches), row) for row, caption in enumerate(group)})
                batches.append(cond)
                bar.update(len(group))
    return MemoryStore(tuple(batches), tuple(places[item.caption] for item in items))


def cache_text_on_disk(
    items: Sequence[Item],
    layout: TextLayout,
    encode: Encode,
    encoder: Mapping[str, str],
    batch_size: int,
    *,
    unread: Collection[str] = (),
    rank: int = 0,
    world: int = 1,
    check: bool = True,
    summaries: Callable[[Path], dict[str, Any]] = store.summary,
    failed: Callable[[Path, str], None] | None = None,
    progress: Callable[..., Any] = logs.progress,
) -> tuple[DiskStore | None, list[str]]:
    """Makes sure that this process's share of the files is there and valid. Files are written after every batch.

    Processes share the work by caption, so that none is encoded twice, and do not wait for each other. Once all are
    done, each makes its store with `disk_store`; a process that is alone gets it from here.

    Args:
        encode: up to `batch_size` captions to their conditioning, whose tensors are named as `layout.keys`.
        encoder: by name, fingerprints of the encoders' weights and all else that decides what they give for a caption.
            Files may have been made with more encoders than these.
        unread: names in `encoder` that may be others in files, as nothing of theirs will be read.
        check: whether to look into files that are there; if not, they are trusted.
        summaries: what `store.summary` says about a file, perhaps remembered.
        failed: is told of images whose caption gives NaN or whose file's name is too long, and why; the others get
            their files. None: the first one ends the run.
        progress: makes a progress bar, as `library.runtime.logs.progress` does.

    Returns: the store (None with several processes), and a line for each file that was there and is made anew.
    Raises: UserError: one file would have to hold two captions, the encoder gives NaN, or a file cannot be written.
    """
    wanted = {name: value for name, value in encoder.items() if name not in unread}
    reasons: list[str] = []
    todo: dict[str, list[Item]] = {}
    share = list(_by_caption(items, layout).items())[rank::world]
    for caption, members in share:
        for item in members:
            file = cache_file(item, layout)
            there = os.path.isfile(file)  # Path.is_file raises over names that are too long
            fault = _fault(file, item, layout, wanted, summaries) if there and check else None
            if fault:
                reasons.append(f"{file}: {fault}; it is made anew")
            if fault or not there:
                todo.setdefault(caption, []).append(item)
    made = sum(map(len, todo.values()))
    used, again = sum(len(members) for _, members in share) - made, len(reasons)
    where = "on disk" if world == 1 else f"on disk, of process {rank + 1}"
    logs.LOGGER.info(
        "text encoder outputs %s: %d used as they are, %d made again, %d new", where, used, again, made - again
    )
    if todo:
        files = [cache_file(item, layout) for members in todo.values() for item in members]
        discard_abandoned(files)
        _encode_to_files(todo, layout, encode, encoder, batch_size, failed, progress)
        flush_file_systems({file.parent for file in files})
    return (disk_store(items, layout) if world == 1 else None), reasons


def unusable_files(
    items: Sequence[Item],
    layout: TextLayout,
    *,
    check: bool = True,
    summaries: Callable[[Path], dict[str, Any]] = store.summary,
) -> dict[Path, str]:
    """The items' files that would have to be made, and why, whichever encoders made those that are there.

    Args: as those of `cache_text_on_disk`.
    """
    found: dict[Path, str] = {}
    for item in items:
        file = cache_file(item, layout)
        fault = "it is not there"
        if os.path.isfile(file):
            fault = _fault(file, item, layout, {}, summaries) if check else None
        if fault:
            found[file] = fault
    return found


def disk_store(items: Sequence[Item], layout: TextLayout) -> DiskStore:
    """The store over files that are all there."""
    return DiskStore(tuple(cache_file(item, layout) for item in items), layout.keys)


def _by_caption(items: Sequence[Item], layout: TextLayout) -> dict[str, list[Item]]:
    """Every different caption with one item for each file that is to hold it. The same in every process."""
    owners: dict[str, Item] = {}
    groups: dict[str, list[Item]] = {}
    clashes: list[str] = []
    for item in items:
        file = cache_file(item, layout)
        place = os.path.normcase(os.path.abspath(file))
        if place not in owners:  # one image may come in several datasets
            owners[place] = item
            groups.setdefault(item.caption, []).append(item)
        elif owners[place].caption != item.caption:
            clashes.append(f"{file}: cannot hold both {owners[place].caption!r} and {item.caption!r}")
    if clashes:
        more = [f"and {len(clashes) - _SHOWN} more files"] if len(clashes) > _SHOWN else []
        raise UserError(
            *clashes[:_SHOWN],
            *more,
            hint="give an image the same caption wherever it is used, or cache text encoder outputs in memory",
        )
    return groups


def _groups(captions: Sequence[str], size: int) -> list[Sequence[str]]:
    return [captions[start : start + size] for start in range(0, len(captions), size)]


def _encode_group(group: Sequence[str], encode: Encode, owners: Mapping[str, Item]) -> TextCond:
    """The conditioning of some captions, on the CPU. `owners` are for messages."""
    cond = _encode_rows(group, encode)
    broken = [f"{owners[caption].image}: {_NAN}" for caption in _broken(cond, group)]
    if broken:
        raise UserError(*broken, hint="run the text encoder in bfloat16 or float32")
    return cond


def _encode_rows(group: Sequence[str], encode: Encode) -> TextCond:
    with torch.no_grad():
        cond = encode(list(group)).map(lambda tensor: tensor.detach().cpu().contiguous())
    for name, tensor in cond.tensors.items():
        if len(tensor) != len(group):
            raise ValueError(f"{name} has {len(tensor)} rows for {len(group)} captions")
    return cond


def _broken(cond: TextCond, group: Sequence[str]) -> list[str]:
    """The captions for which the encoder gives NaN."""
    whole = [all(torch.isfinite(tensor[row]).all() for tensor in cond.tensors.values()) for row in range(len(group))]
    return [caption for caption, is_whole in zip(group, whole, strict=True) if not is_whole]


def _encode_to_files(
    todo: Mapping[str, Sequence[Item]],
    layout: TextLayout,
    encode: Encode,
    encoder: Mapping[str, str],
    batch_size: int,
    failed: Callable[[Path, str], None] | None,
    progress: Callable[..., Any],
) -> None:
    """Writes the files of one batch while the next is encoded. What was encoded is written even if that fails."""
    owners = {caption: members[0] for caption, members in todo.items()}
    files = sum(len(members) for members in todo.values())
    flags = {name: np.array(value) for name, value in layout.flags.items()}
    with (
        progress(total=files, desc="caching text encoder outputs", unit="file") as bar,
        ThreadPoolExecutor(max_workers=1) as pool,
    ):
        writing: list[tuple[Item, Future[None]]] = []
        for group in _groups(list(todo), batch_size):
            cond = _encode_group(group, encode, owners) if failed is None else _encode_rows(group, encode)
            if set(cond.tensors) != set(layout.keys):
                raise ValueError(f"the encoder gives {sorted(cond.tensors)}, the files hold {sorted(layout.keys)}")
            _finish(writing, failed, bar)
            writing = []
            broken = set() if failed is None else set(_broken(cond, group))
            for row, caption in enumerate(group):
                if caption in broken:
                    _refuse(todo[caption], failed, bar)
                    continue
                arrays = {name: _array(cond.tensors[name][row]) for name in layout.keys}
                note = store.pack_note(_note(caption, encoder))
                for item in todo[caption]:
                    file = cache_file(item, layout)
                    content = {**arrays, **flags, store.PROVENANCE: note}
                    writing.append((item, pool.submit(_write, file, content)))
        _finish(writing, failed, bar)


def _refuse(items: Sequence[Item], failed: Callable[[Path, str], None], bar: Any) -> None:
    for item in items:
        failed(item.image, _NAN)
        bar.update(1)


def _finish(writing: Iterable[tuple[Item, Future[None]]], failed: Callable[[Path, str], None] | None, bar: Any) -> None:
    for item, future in writing:
        try:
            future.result()
        except NameTooLongError as error:
            if failed is None:
                raise
            failed(item.image, error.problems[0])
        bar.update(1)


def _write(file: Path, arrays: Arrays) -> None:
    try:
        store.write(file, arrays)
    except OSError as error:
        too_long = error.errno == errno.ENAMETOOLONG
        mend = "shorten the image's name" if too_long else "free some space or make the folder writable"
        raise (NameTooLongError if too_long else UserError)(
            f"{file}: the cache file cannot be written ({error.strerror or error})",
            hint=f"{mend}, or cache text encoder outputs in memory",
        ) from None


def _array(row: Tensor) -> NDArray[Any]:
    return (row.float() if row.dtype == torch.bfloat16 else row).numpy()  # numpy has no bfloat16


def _note(caption: str, encoder: Mapping[str, str]) -> dict[str, Any]:
    return {
        "software": NAME,
        "version": VERSION,
        "caption": hashlib.sha256(caption.encode()).hexdigest()[:32],
        "encoder": dict(encoder),
    }


def _fault(
    file: Path, item: Item, layout: TextLayout, encoder: Mapping[str, str], summaries: Callable[[Path], dict[str, Any]]
) -> str | None:
    """Why a file that is there cannot be used for an item, or None."""
    facts = summaries(file)
    if "damaged" in facts:
        return f"damaged ({facts['damaged']})"
    found = {name: (tuple(shape), dtype) for name, (shape, dtype) in facts["arrays"].items()}
    missing = [name for name in (*layout.keys, *layout.flags) if name not in found]
    if missing:
        return f"it has no {' and no '.join(missing)}"
    for name in layout.keys:
        shape, dtype = found[name]
        if dtype not in _DTYPES:
            return f"{name} is of the type {dtype}"
        if shape != layout.shapes.get(name, shape):
            return f"{name} has the shape {shape}, not {layout.shapes[name]}"
    broken = [name for name in layout.keys if name in facts["not_finite"]]
    if broken:
        return f"NaN or infinite values in {' and '.join(broken)}"
    other = [f"{name} {value}" for name, value in layout.flags.items() if facts["values"].get(name) != value]
    if other:
        return f"not made with {' and '.join(other)}"
    note = facts["provenance"].get("")
    return _foreign_fault(file, item, layout) if note is None else _note_fault(note, _note(item.caption, encoder))


def _note_fault(note: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    if note.get("caption") != wanted["caption"]:
        return "made for another caption"
    made = note.get("encoder")
    if not isinstance(made, dict) or not wanted["encoder"].items() <= made.items():
        return "made by another text encoder, or with other settings of it"
    return None


def _foreign_fault(file: Path, item: Item, layout: TextLayout) -> str | None:
    """Files of earlier trainers do not tell their caption, so that only time can say whether it has changed."""
    if layout.reject_foreign:
        return layout.reject_foreign
    if item.changed:
        return "it does not tell its caption, and what earlier trainers put there is the caption file as it is"
    source = item.caption_file or item.image
    try:
        older = file.stat().st_mtime_ns < source.stat().st_mtime_ns
    except OSError as error:
        return f"it does not tell its caption, and cannot be compared with {source.name} ({error.strerror or error})"
    return f"it does not tell its caption, and is older than {source.name}" if older else None


def _not_finite(arrays: Mapping[str, NDArray[Any]]) -> str | None:
    broken = [name for name, array in arrays.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
    return f"NaN or infinite values in {' and '.join(broken)}" if broken else None
