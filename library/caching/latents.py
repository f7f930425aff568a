"""Encodes every image once, before training, and keeps the latents in memory or in files beside the images."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from library.caching import latent_files, store
from library.caching.latent_files import Entry, Identity, Latents, Wanted
from library.caching.stems import shared_stems
from library.data import buckets, images
from library.data.rendering import View, loss_mask, render
from library.errors import NameTooLongError, UserError
from library.runtime import logs, seeds
from library.runtime.durable import discard_abandoned, flush_file_systems
from library.runtime.logs import LOGGER
from library.runtime.processes import Processes
from library.types import CacheLayout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from library.data.dataset import TrainingData
    from library.data.index import FileIndex
    from library.data.types import Record
    from library.types import Size

Work = TypeVar("Work")
Result = TypeVar("Result")
Encode = Callable[[Tensor, list[torch.Generator]], Tensor]

_TOLD = 20  # files that are rebuilt are named up to so many


@dataclass(frozen=True)
class Encoder:
    """How images become latents.

    `encode` takes pixels (B, 3, H, W) in [-1, 1] on the CPU, all of one size, and a generator per image, and gives
    latents (B, C, H/8, W/8) as caches hold them.
    """

    encode: Encode
    batch_size: int
    seed: int  # of the draws from the VAE's posterior
    processes: Processes = field(default_factory=Processes)
    progress: Callable[..., Any] = logs.progress
    workers: int | None = None  # threads that decode images ahead; None: one per processor, up to 8


# ---- what the data holds afterwards


class CachedLatents(NamedTuple):
    """Latents of one record in memory, on the CPU."""

    plain: Tensor  # (C, H/8, W/8)
    flipped: Tensor | None
    mask: Tensor | None  # (1, H/8, W/8) in [0, 1], as without mirroring

    def load(self, flip: bool) -> tuple[Tensor, Tensor | None]:
        mask = self.mask.flip(-1) if flip and self.mask is not None else self.mask
        return (self.flipped if flip else self.plain), mask


class LatentsOnDisk(NamedTuple):
    """Where the latents of one record lie; read whenever they are needed."""

    entry: Entry
    alpha: bool
    mask: bool

    def load(self, flip: bool) -> tuple[Tensor, Tensor | None]:
        """Raises: UserError: the file is gone or damaged."""
        # The mask image's array has the transparency in it already.
        alpha = self.alpha and not self.mask
        read = latent_files.load(self.entry, plain=not flip, flip=flip, alpha=alpha, mask=self.mask)
        latents = torch.from_numpy(read.flipped if flip else read.plain)
        plane = read.mask if self.mask else read.alpha
        if plane is None:
            return latents, None
        mask = torch.from_numpy(plane)[None]
        return latents, mask.flip(-1) if flip else mask


# ---- the two kinds of cache


def cache_in_memory(data: TrainingData, encoder: Encoder) -> None:
    """Encodes all images of `data`, which yields latents from then on. Several processes share the work.

    Raises: UserError: an image cannot be read, or the VAE gives NaN for it.
    """
    wanted = wanted_of(data.all_records)
    owners = dict(zip(wanted, data.all_records, strict=True))
    jobs, processes = _in_order(owners), encoder.processes
    encoded = dict(_encode(processes.share_of(jobs), owners, encoder))
    if processes.world > 1:
        encoded = _gather(jobs, encoded, processes)
    data.set_latents([encoded[one].in_memory() for one in wanted], in_memory=True)


def cache_on_disk(data: TrainingData, encoder: Encoder, layout: CacheLayout, vae: str, *, check: bool = True) -> None:
    """Makes sure that every image's latents lie beside it; `data` reads them from there from then on.

    Files that fit are used, whoever made them. The others are named and made again. Several processes share the work,
    file by file. What is done when a run is stopped is there for the next.

    Args:
        vae: fingerprint of the VAE's weights.
        check: False: files are trusted without looking into them (--skip_cache_check).

    Raises: UserError: an image cannot be read, the VAE gives NaN for it, latents without an image cannot be used, or
        a file cannot be written.
    """
    wanted, shelf, missing, found = _make_files(data.all_records, data.index, encoder, layout, vae, check=check)
    found |= {one: shelf.find_written(one) for one in missing}
    entries = [LatentsOnDisk(found[one], one.alpha, one.mask is not None) for one in wanted]
    data.set_latents(entries, in_memory=False)


def make_files(
    records: Sequence[Record],
    index: FileIndex,
    encoder: Encoder,
    layout: CacheLayout,
    vae: str,
    failed: Callable[[Path, str], None],
    *,
    check: bool = True,
    again: bool = False,
) -> int:
    """Makes sure that every record's latents lie beside its image, for later runs. Processes share the work.

    Args:
        vae: fingerprint of the VAE's weights.
        failed: is told of images that cannot be read or encoded, and why, in the process that had them to do.
        check: as in `cache_on_disk`.
        again: files that are there are made again, even if they fit.

    Returns: how many of the records had latents already that fit; the same in every process.
    Raises: UserError: latents without an image cannot be used, or a file cannot be written.
    """
    made = _make_files(records, index, encoder, layout, vae, check=check, again=again, failed=failed)
    missing = set(made.missing)
    return sum(one not in missing for one in made.wanted)


class _Made(NamedTuple):
    wanted: list[Wanted]  # of every record
    shelf: _Shelf
    missing: list[Wanted]  # what had to be made, by whichever process
    found: dict[Wanted, Entry | str | None]  # what was there, or why it does not fit


def _make_files(
    records: Sequence[Record],
    index: FileIndex,
    encoder: Encoder,
    layout: CacheLayout,
    vae: str,
    *,
    check: bool,
    again: bool = False,
    failed: Callable[[Path, str], None] | None = None,
) -> _Made:
    """`failed`: see `make_files`; None: the first failure ends the run."""
    wanted = wanted_of(records)
    owners = dict(zip(wanted, records, strict=True))
    shelf = _Shelf(index, layout, vae, [] if again else list(owners), check)
    found = {one: None if again else shelf.find(one) for one in owners}
    missing = [one for one, entry in found.items() if not isinstance(entry, Entry)]
    _refuse_lost_images(missing, found)
    if not again:
        _tell_what_is_made(found)
    encoder.processes.wait()  # nobody writes while others still look
    places = sorted({shelf.place(one) for one in missing})
    mine = set(encoder.processes.share_of(places))
    discard_abandoned(mine)
    jobs = _in_order(one for one in missing if shelf.place(one) in mine)
    for one, latents in _encode(jobs, owners, encoder, failed):
        try:
            shelf.save(one, latents)
        except NameTooLongError as error:
            if failed is None:
                raise
            failed(one.image, error.problems[0])
    flush_file_systems({place.parent for place in mine})  # before the index says that they are whole
    encoder.processes.wait()
    return _Made(wanted, shelf, missing, found)


def wanted_of(records: Sequence[Record]) -> list[Wanted]:
    """What each record needs of a cache. Records of the same look of an image need the same."""
    shared = shared_stems(records)
    flips: dict[_Look, bool] = {}
    variants: dict[tuple[Path, Size], dict[_Look, str]] = {}
    for record in records:
        look = _look(record)
        flips[look] = flips.get(look, False) or record.flip
        others = variants.setdefault((record.path, record.bucket), {})
        if look not in others:
            # The first look has the name that other programs know, the others one of their own.
            others[look] = f"~{seeds.derive(0, *map(str, look[2:])) % 16**8:08x}" if others else ""
    return [
        _wanted(
            record,
            shared=record.path in shared,
            flip=flips[_look(record)],
            variant=variants[record.path, record.bucket][_look(record)],
        )
        for record in records
    ]


class _Look(NamedTuple):
    """What decides over latents and masks of an image."""

    path: Path
    bucket: Size
    resized: Size | None
    interpolation: str | None
    alpha: bool
    mask: Path | None


def _look(record: Record) -> _Look:
    subset = record.subset
    frame = (record.path, record.bucket, record.resized)
    return _Look(*frame, subset.resize_interpolation, subset.alpha_mask, record.conditioning)


def _wanted(record: Record, *, shared: bool, flip: bool, variant: str) -> Wanted:
    frame = record.size if record.resized is not None else record.bucket
    return Wanted(
        image=record.path if record.present else record.path.with_name(f"{record.path.name}.png"),
        present=record.present,
        shared_stem=shared,
        size=record.size,
        bucket=record.bucket,
        resized=record.resized,
        crop_ltrb=buckets.crop_ltrb(record.bucket, frame),
        interpolation=record.subset.resize_interpolation,
        flip=flip,
        alpha=record.subset.alpha_mask,
        mask=record.conditioning,
        variant=variant,
    )


def files_are_there(data: TrainingData, layout: CacheLayout) -> bool:
    """Whether every image has a file of latents, whatever is in it."""
    return next(without_files(data.all_records, data.index, layout), None) is None


def without_files(records: Sequence[Record], index: FileIndex, layout: CacheLayout) -> Iterator[Path]:
    """The images that have no file of latents."""
    for one in wanted_of(records):
        if all(index.stamp(file) is None for file in latent_files.files_of(one, layout)):
            yield one.image


class _Shelf:
    """The latent files of a run, and what the index knows of them."""

    def __init__(self, index: FileIndex, layout: CacheLayout, vae: str, wanted: Sequence[Wanted], check: bool):
        self.index, self.layout, self.vae, self.check = index, layout, vae, check
        if not check:
            return
        # Everything is looked into in parallel here, and asked for one by one below.
        files = [file for one in wanted for file in self._files(one) if index.stamp(file) is not None]
        notes = {file: told.get("provenance") for file, told in zip(files, self._summaries(files), strict=True)}
        judged = [one for one in wanted if any(notes.get(file) for file in self._files(one))]
        self._digests([path for one in judged for path in _sources(one)])
        foreign = sum(self._is_of_another_vae(one, notes) for one in judged)
        if foreign:
            LOGGER.warning(
                "%d images are not there, and their latents were made by another VAE; they are used", foreign
            )

    def _is_of_another_vae(self, wanted: Wanted, notes: Mapping[Path, Any]) -> bool:
        if wanted.present:
            return False
        made_by = {note.get("vae") for file in self._files(wanted) for note in (notes.get(file) or {}).values()}
        return bool(made_by) and self.vae not in made_by

    def place(self, wanted: Wanted) -> Path:
        """Where latents that are made now will lie."""
        return self._files(wanted)[-1]

    def find(self, wanted: Wanted) -> Entry | str | None:
        identity, stamp = partial(self._identity, wanted), self.index.stamp
        return latent_files.find(wanted, self.layout, identity, self._summary, stamp, check=self.check)

    def save(self, wanted: Wanted, latents: Encoded) -> None:
        """Raises: UserError: the file cannot be written."""
        arrays = Latents(
            latents.plain.numpy(),
            None if latents.flipped is None else latents.flipped.numpy(),
            latents.alpha if wanted.alpha else None,
            latents.mask[0].numpy() if wanted.mask is not None else None,
        )
        try:
            latent_files.save(wanted, self.layout, arrays, self._identity(wanted))
        except OSError as error:
            kind = NameTooLongError if error.errno == errno.ENAMETOOLONG else UserError
            why = error.strerror or error
            raise kind(f"{self.place(wanted)}: the latents cannot be written ({why})") from None

    def find_written(self, wanted: Wanted) -> Entry:
        """What `save` of any process has written. Raises: UserError: it is not there."""
        identity = partial(self._identity, wanted)
        entry = latent_files.find(wanted, self.layout, identity, store.summary, _stamp_now, check=False)
        if not isinstance(entry, Entry):
            raise UserError(f"{self.place(wanted)}: the latents were written and cannot be found ({entry})")
        return entry

    def _files(self, wanted: Wanted) -> list[Path]:
        return latent_files.files_of(wanted, self.layout)

    def _identity(self, wanted: Wanted) -> Identity:
        image = self._digests([wanted.image])[0] if wanted.present else None
        # Latents that cannot be made again are used as they are; `_Shelf` has told if they are another VAE's.
        vae = self.vae if wanted.present else None
        return Identity(image, vae, self._digests([wanted.mask])[0] if wanted.mask is not None else None)

    def _digests(self, paths: Sequence[Path]) -> list[str]:
        return self.index.learn("digest", paths, images.content_digest)

    def _summary(self, file: Path) -> Mapping[str, Any]:
        return self._summaries([file])[0]

    def _summaries(self, files: Sequence[Path]) -> list[Mapping[str, Any]]:
        return self.index.learn("latents", files, store.summary)


def _sources(wanted: Wanted) -> list[Path]:
    images = [wanted.image] if wanted.present else []
    return images + ([wanted.mask] if wanted.mask is not None else [])


def _stamp_now(file: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _refuse_lost_images(missing: Sequence[Wanted], found: Mapping[Wanted, Entry | str | None]) -> None:
    lost = [one for one in missing if not one.present]
    if lost:
        lines = [f"{found[one] or f'{one.image.with_suffix(str())}: no latents'}; there is no image" for one in lost]
        more = [f"and {len(lost) - _TOLD} more like these"] if len(lost) > _TOLD else []
        raise UserError(*lines[:_TOLD], *more, hint="bring the images back, or remove their entries")


def _tell_what_is_made(found: Mapping[Wanted, Entry | str | None]) -> None:
    refused = [entry for entry in found.values() if isinstance(entry, str)]
    for reason in refused[:_TOLD]:
        LOGGER.warning("made again: %s", reason)
    if len(refused) > _TOLD:
        LOGGER.warning("and %d more latent files are made again", len(refused) - _TOLD)
    new = sum(entry is None for entry in found.values())
    usable = len(found) - new - len(refused)
    LOGGER.info("latents on disk: %d used as they are, %d made again, %d new", usable, len(refused), new)


# ---- encoding


class Encoded(NamedTuple):
    """What is made for one `Wanted`."""

    plain: Tensor  # (C, h, w)
    flipped: Tensor | None
    alpha: NDArray[np.float32] | None  # (bucket height, bucket width), transparency alone, for files
    mask: Tensor | None  # (1, h, w), transparency and mask image together

    def in_memory(self) -> CachedLatents:
        return CachedLatents(self.plain, self.flipped, self.mask)


class _Decoded(NamedTuple):
    pixels: Tensor  # (3, H, W)
    view: View


def _in_order(wanted: Iterable[Wanted]) -> list[Wanted]:
    """One size after the other, so that batches are full and the VAE sees each shape in one run."""
    return sorted(wanted, key=lambda one: (one.bucket, one.image))


def _encode(
    jobs: Sequence[Wanted],
    owners: Mapping[Wanted, Record],
    encoder: Encoder,
    failed: Callable[[Path, str], None] | None = None,
) -> Iterator[tuple[Wanted, Encoded]]:
    """Encodes in batches of one size; images are decoded ahead in threads.

    Args:
        failed: is told of each image that cannot be read or for which the VAE gives NaN; None: UserError is raised.
    """
    if not jobs and encoder.processes.world == 1:
        return
    ahead = _ahead(partial(_decoded_or_error, owners), jobs, 2 * encoder.batch_size, encoder.workers)
    bar = encoder.progress(total=len(jobs), desc="caching latents", unit="img")
    with bar as bar, closing(ahead) as decoded, torch.no_grad():
        for group in _batches(jobs, encoder.batch_size):
            usable = []
            for one in group:
                image = next(decoded)
                if isinstance(image, _Decoded):
                    usable.append((one, image))
                elif failed is None:
                    raise image
                else:
                    failed(one.image, image.problems[0])
            yield from _encode_usable(usable, encoder, failed)
            bar.update(len(group))


def _decoded_or_error(owners: Mapping[Wanted, Record], wanted: Wanted) -> _Decoded | UserError:
    try:
        return _decode(owners[wanted])
    except UserError as error:
        return error


def _encode_usable(
    usable: Sequence[tuple[Wanted, _Decoded]], encoder: Encoder, failed: Callable[[Path, str], None] | None
) -> Iterator[tuple[Wanted, Encoded]]:
    """A batch; one by one where the VAE gives NaN for some, so that the others have their latents."""
    if not usable:
        return
    group = [one for one, _ in usable]
    try:
        encoded = _encode_group(group, [image for _, image in usable], encoder)
    except UserError as error:
        if failed is None:
            raise
        if len(usable) == 1:
            failed(group[0].image, error.problems[0])
            return
    else:
        yield from zip(group, encoded, strict=True)
        return
    for one in usable:
        yield from _encode_usable([one], encoder, failed)


def _encode_group(group: Sequence[Wanted], images: Sequence[_Decoded], encoder: Encoder) -> list[Encoded]:
    pixels = [image.pixels for image in images]
    plain = _run(group, pixels, encoder, "plain")
    mirrored = [position for position, one in enumerate(group) if one.flip]
    flipped: dict[int, Tensor] = {}
    if mirrored:
        chosen = [group[position] for position in mirrored]
        tensors = _run(chosen, [pixels[position].flip(-1) for position in mirrored], encoder, "flipped")
        flipped = dict(zip(mirrored, tensors, strict=True))
    encoded = []
    for position, (latents, image) in enumerate(zip(plain, images, strict=True)):
        mask = loss_mask(image.view)
        small = None if mask is None else functional.adaptive_avg_pool2d(mask, latents.shape[-2:])
        alpha = None if image.view.alpha is None else image.view.alpha.astype(np.float32) / 255
        encoded.append(Encoded(latents, flipped.get(position), alpha, small))
    return encoded


def _run(group: Sequence[Wanted], pixels: Sequence[Tensor], encoder: Encoder, look: str) -> list[Tensor]:
    # By name, so that an image's latents do not depend on its neighbours, on the order or on the process.
    rngs = [seeds.generator("cpu", encoder.seed, "latents", one.image.name, *one.bucket, look) for one in group]
    latents = encoder.encode(torch.stack(list(pixels)), rngs).float().cpu()
    _refuse_nan(latents, group)
    return [one.clone() for one in latents]  # each its own memory: a view would keep the batch


def _decode(record: Record) -> _Decoded:
    # The generator is never drawn from: build_specs refuses cached latents where images vary by chance.
    view = render(record, False, Random(0))
    return _Decoded(images.to_pixels(view.pixels), view)


def _batches(jobs: Sequence[Wanted], batch_size: int) -> Iterator[list[Wanted]]:
    """Runs of one bucket size, cut to `batch_size`."""
    group: list[Wanted] = []
    for one in jobs:
        if group and (len(group) == batch_size or group[0].bucket != one.bucket):
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def _ahead(
    work: Callable[[Work], Result], todo: Iterable[Work], window: int, threads: int | None = None
) -> Iterator[Result]:
    """Results in order, computed in threads; at most `window` plus one per thread are waiting, to bound memory.

    Args:
        threads: 0 computes each when it is asked for; None takes as many as there are processors, up to 8.
    """
    if threads == 0:
        yield from map(work, todo)
        return
    threads = threads or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Any] = deque()
        try:
            for one in todo:
                waiting.append(pool.submit(work, one))
                if len(waiting) >= window + threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _refuse_nan(latents: Tensor, group: Sequence[Wanted]) -> None:
    broken = [one for one, latent in zip(group, latents, strict=True) if not torch.isfinite(latent).all()]
    if broken:
        raise UserError(
            *(f"{one.image}: the VAE gives NaN or infinite latents" for one in broken),
            hint="--no_half_vae encodes in float32",
        )


# ---- several processes


def _gather(jobs: Sequence[Wanted], own: Mapping[Wanted, Encoded], processes: Processes) -> dict[Wanted, Encoded]:
    """Everybody's latents for everybody."""
    processes.wait()
    shares = [Processes(rank, processes.world).share_of(jobs) for rank in range(processes.world)]
    channels = processes.largest(next((len(one.plain) for one in own.values()), 0))
    sent = [tensor for one in own.values() for tensor in (one.plain, one.flipped, one.mask) if tensor is not None]
    shapes = [[shape for one in share for shape in _shapes(one, channels)] for share in shares]
    gathered: dict[Wanted, Encoded] = {}
    for share, tensors in zip(shares, processes.exchange(sent, shapes), strict=True):
        rest = iter(tensors)
        for one in share:
            plain = next(rest)
            flipped = next(rest) if one.flip else None
            gathered[one] = Encoded(plain, flipped, None, next(rest) if one.alpha or one.mask is not None else None)
    return gathered


def _shapes(wanted: Wanted, channels: int) -> list[tuple[int, ...]]:
    """Of plain latents, flipped ones, mask: as many as there are."""
    sides = wanted.bucket.height // latent_files.LATENT_SCALE, wanted.bucket.width // latent_files.LATENT_SCALE
    masks = [(1, *sides)] if wanted.alpha or wanted.mask is not None else []
    return [(channels, *sides)] * (1 + wanted.flip) + masks
