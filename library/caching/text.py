"""What the text encoders give for captions that never change: encoded once, before training, into memory or files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from library.caching import foreign, store
from library.caching.encode_missing import (
    MOST_NAMED,
    Encoder,
    OnError,
    batches,
    encode_missing,
    report_missing,
    write_files,
)
from library.caching.entry import Arrays, image_of, read_arrays, shared_stems, unusable
from library.data.sample.captions import make_caption
from library.errors import UserError
from library.runtime.durable import fitting
from library.types import TextCond, TextLayout
from library.version import NAME, VERSION

if TYPE_CHECKING:
    from library.data.types import Record

Encode = Callable[[list[str]], TextCond]  # captions to their conditioning, a row for each

_ABSENT = "it is not there"
_DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")  # that torch has too


@dataclass(frozen=True)
class TextRequest:
    """The cache entry that a record needs."""

    image: Path
    caption: str  # as training gives it to the encoder
    shared_stem: bool = False  # another image of the folder differs in its extension only
    changed: bool = False  # the caption is not what the caption file says, e.g. it has a prefix
    caption_file: Path | None = None


@dataclass(frozen=True)
class MemoryStore:
    """Batches as they were encoded, so that pickling copies each once, and the place of every record in them."""

    batches: tuple[TextCond, ...]
    places: tuple[tuple[int, int], ...]  # (batch, row) by record

    def get(self, number: int) -> dict[str, Tensor]:
        """See `TextStore`."""
        batch, row = self.places[number]
        return {name: tensor[row] for name, tensor in self.batches[batch].tensors.items()}


@dataclass(frozen=True)
class DiskStore:
    """Reads a record's file whenever its outputs are needed."""

    files: tuple[Path, ...]  # by record
    keys: tuple[str, ...]

    def get(self, number: int) -> dict[str, Tensor]:
        """See `TextStore`."""
        file = self.files[number]
        arrays = read_arrays(file, self.keys, "text encoder outputs")
        broken = [name for name, array in arrays.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
        if broken:  # in a file that was not checked
            raise unusable(file, "text encoder outputs", f"NaN or infinite values in {' and '.join(broken)}")
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def requests_of(records: Sequence[Record]) -> list[TextRequest]:
    """The request of each record. Captions must not change, see `captions.changing`."""
    shared = shared_stems(records)
    return [
        TextRequest(
            image=image_of(record),
            # Nothing is drawn and no step counts, as nothing in the caption changes.
            caption=make_caption(record.caption, record.subset.captions, Random(0), epoch=1, step=0),
            shared_stem=record.path in shared,
            changed=bool(record.subset.captions.caption_prefix or record.subset.captions.caption_suffix),
        )
        for record in records
    ]


def cache_file(request: TextRequest, layout: TextLayout) -> Path:
    """The file of a record's outputs. Where an image shares its stem with another, the extension stays in the name.

    A name that is too long is shortened.
    """
    stem = request.image.name if request.shared_stem else request.image.stem
    return request.image.with_name(fitting(stem, layout.suffix))


def cache_in_memory(requests: Sequence[TextRequest], encoder: Encoder) -> MemoryStore:
    """Encodes every different caption once and keeps the outputs in the dtypes that the encoder gives.

    Processes share the work; each gets all outputs. Raises: UserError: the encoder gives NaN for a caption.
    """
    owners = {one.caption: one for one in reversed(requests)}  # of equal captions, the first record
    captions = list(dict.fromkeys(one.caption for one in requests))
    groups = list(batches(captions, encoder.batch_size))
    processes = encoder.processes
    conds: list[TextCond] = []
    places: dict[str, tuple[int, int]] = {}
    with encoder.progress(total=len(captions), desc="caching text encoder outputs", unit="captions") as bar:
        for start in range(0, len(groups), processes.world):
            together = groups[start : start + processes.world]
            own = None
            if processes.rank < len(together):
                own = _encode(together[processes.rank], encoder)
                broken = [_nan_error(owners[caption]) for caption in _not_finite_rows(own, together[processes.rank])]
                if broken:
                    raise UserError(*(error.problems[0] for error in broken), hint=broken[0].hint)
            for group, cond in zip(together, processes.all_gather(own), strict=False):
                places.update({caption: (len(conds), row) for row, caption in enumerate(group)})
                conds.append(cond)
                bar.update(len(group))
    return MemoryStore(tuple(conds), tuple(places[one.caption] for one in requests))


def cache_on_disk(
    requests: Sequence[TextRequest],
    layout: TextLayout,
    encoder: Encoder,
    made_by: Mapping[str, str],
    *,
    skip_encoders: Collection[str] = (),
    check: bool = True,
    on_error: OnError | None = None,
) -> DiskStore:
    """Makes sure that a valid file lies beside every image. Files are written while the next batch is encoded.

    Files that fit are used, whoever made them; the others are named and made again. Processes share the work by
    caption, so that none is encoded twice, and each checks its share only.

    Args:
        encoder: gives conditioning whose tensors are named as `layout.keys`.
        made_by: by name, fingerprints of the encoders' weights and all else that decides what they give for a caption.
            Files may have been made with more encoders than these.
        skip_encoders: names in `made_by` that may be others in files, as nothing of theirs will be read.
        check: False: files are trusted without looking into them (--skip_cache_check).
        on_error: gets images whose caption gives NaN or whose file's name is too long, and why; the others get their
            files. None: the first one ends the run.

    Raises: UserError: one file would have to hold two captions, the encoder gives NaN, or a file cannot be written.
    """
    wanted = {name: value for name, value in made_by.items() if name not in skip_encoders}
    processes = encoder.processes
    share = processes.shard(list(_by_caption(requests, layout).items()))
    invalid: list[str] = []
    todo: dict[str, list[TextRequest]] = {}
    for caption, members in share:
        for one in members:
            file = cache_file(one, layout)
            reason = _reason_to_make(file, one, layout, wanted, check)
            if reason:
                todo.setdefault(caption, []).append(one)
                invalid += [] if reason == _ABSENT else [f"{file}: {reason}"]
    made = sum(map(len, todo.values()))
    kept = sum(len(members) for _, members in share) - made
    where = "" if processes.world == 1 else f", of process {processes.rank + 1}"
    report_missing(f"text encoder outputs on disk{where}", kept, invalid, made - len(invalid))
    if todo:
        _encode_to_files(todo, layout, encoder, made_by, on_error)
    processes.barrier()
    return DiskStore(tuple(cache_file(one, layout) for one in requests), layout.keys)


def invalid_files(requests: Sequence[TextRequest], layout: TextLayout, *, check: bool = True) -> dict[Path, str]:
    """The files that would have to be made, and why, whichever encoders made those that are there.

    Args: as those of `cache_on_disk`.
    """
    files = {cache_file(one, layout): one for one in requests}
    reasons = {file: _reason_to_make(file, one, layout, {}, check) for file, one in files.items()}
    return {file: reason for file, reason in reasons.items() if reason}


def _by_caption(requests: Sequence[TextRequest], layout: TextLayout) -> dict[str, list[TextRequest]]:
    """Every different caption with one record for each file that is to hold it. The same in every process."""
    owners: dict[str, TextRequest] = {}
    groups: dict[str, list[TextRequest]] = {}
    clashes: list[str] = []
    for one in requests:
        file = cache_file(one, layout)
        place = os.path.normcase(os.path.abspath(file))
        if place not in owners:  # one image may come in several datasets
            owners[place] = one
            groups.setdefault(one.caption, []).append(one)
        elif owners[place].caption != one.caption:
            clashes.append(f"{file}: cannot hold both {owners[place].caption!r} and {one.caption!r}")
    if clashes:
        more = [f"and {len(clashes) - MOST_NAMED} more files"] if len(clashes) > MOST_NAMED else []
        raise UserError(
            *clashes[:MOST_NAMED],
            *more,
            hint="give an image the same caption wherever it is used, or cache text encoder outputs in memory",
        )
    return groups


def _encode(captions: list[str], encoder: Encoder) -> TextCond:
    """The conditioning of some captions, on the CPU."""
    with torch.no_grad():
        cond = encoder.encode(captions).map(lambda tensor: tensor.detach().cpu().contiguous())
    for name, tensor in cond.tensors.items():
        if len(tensor) != len(captions):
            raise ValueError(f"{name} has {len(tensor)} rows for {len(captions)} captions")
    return cond


def _not_finite_rows(cond: TextCond, captions: Sequence[str]) -> list[str]:
    """The captions for which the encoder gives NaN."""
    return [
        caption
        for row, caption in enumerate(captions)
        if not all(torch.isfinite(tensor[row]).all() for tensor in cond.tensors.values())
    ]


def _nan_error(request: TextRequest) -> UserError:
    why = "the text encoder gives NaN or infinite values for its caption"
    return UserError(f"{request.image}: {why}", hint="run the text encoder in bfloat16 or float32")


def _encode_to_files(
    todo: Mapping[str, Sequence[TextRequest]],
    layout: TextLayout,
    encoder: Encoder,
    made_by: Mapping[str, str],
    on_error: OnError | None,
) -> None:
    def encode(captions: list[str], _: list[Any]) -> list[Arrays | UserError]:
        cond = _encode(captions, encoder)
        if set(cond.tensors) != set(layout.keys):
            raise ValueError(f"the encoder gives {sorted(cond.tensors)}, the files hold {sorted(layout.keys)}")
        broken = _not_finite_rows(cond, captions)
        cond = cond.map(lambda one: one.float() if one.dtype == torch.bfloat16 else one)  # numpy has no bfloat16
        return [
            _nan_error(todo[caption][0])
            if caption in broken
            else {name: cond.tensors[name][row].numpy() for name in layout.keys}
            for row, caption in enumerate(captions)
        ]

    def refuse(caption: str, error: UserError) -> None:
        for one in todo[caption]:
            on_error(one.image, error.problems[0].removeprefix(f"{todo[caption][0].image}: "))

    def writes() -> Iterator[tuple[TextRequest, Path, Callable[[], None]]]:
        for caption, arrays in encoded:
            content = {**arrays, **flags, store.PROVENANCE: store.pack_note(_note(caption, made_by))}
            for one in todo[caption]:
                file = cache_file(one, layout)
                yield one, file, partial(store.write, file, content)

    flags = {name: np.array(value) for name, value in layout.flags.items()}
    files = [cache_file(one, layout) for members in todo.values() for one in members]
    bar = encoder.progress(total=len(files), desc="caching text encoder outputs", unit="files")
    encoded = encode_missing(
        list(batches(list(todo), encoder.batch_size)),
        lambda caption: caption,
        encode,
        bar,
        on_error=None if on_error is None else refuse,
        count=lambda caption: len(todo[caption]),
    )
    too_long = None if on_error is None else lambda one, error: on_error(one.image, error.problems[0])
    write_files(writes(), files, 2 * encoder.batch_size, too_long)


def _note(caption: str, made_by: Mapping[str, str]) -> dict[str, Any]:
    return {
        "software": NAME,
        "version": VERSION,
        "caption": hashlib.sha256(caption.encode()).hexdigest()[:32],
        "encoder": dict(made_by),
    }


def _reason_to_make(
    file: Path, request: TextRequest, layout: TextLayout, made_by: Mapping[str, str], check: bool
) -> str | None:
    """Why the file cannot be used, or `_ABSENT`; None: it is there and fits, or is trusted without a `check`."""
    is_there = os.path.isfile(file)  # Path.is_file raises over names that are too long
    if not is_there or not check:
        return None if is_there else _ABSENT
    contents = store.summary(file)
    if "damaged" in contents:
        return f"damaged ({contents['damaged']})"
    found = {name: (tuple(shape), dtype) for name, (shape, dtype) in contents["arrays"].items()}
    missing = [name for name in (*layout.keys, *layout.flags) if name not in found]
    if missing:
        return f"it has no {' and no '.join(missing)}"
    for name in layout.keys:
        shape, dtype = found[name]
        if dtype not in _DTYPES:
            return f"{name} is of the type {dtype}"
        if shape != layout.shapes.get(name, shape):
            return f"{name} has the shape {shape}, not {layout.shapes[name]}"
    broken = [name for name in layout.keys if name in contents["not_finite"]]
    if broken:
        return f"NaN or infinite values in {' and '.join(broken)}"
    other = [f"{name} {value}" for name, value in layout.flags.items() if contents["values"].get(name) != value]
    if other:
        return f"not made with {' and '.join(other)}"
    note = contents["provenance"].get("")
    if note is None:
        return foreign.text_reason(file, layout, request.caption_file or request.image, changed=request.changed)
    if note.get("caption") != _note(request.caption, made_by)["caption"]:
        return "made for another caption"
    encoders = note.get("encoder")
    if not isinstance(encoders, dict) or not made_by.items() <= encoders.items():
        return "made by another text encoder, or with other settings of it"
    return None
