"""Encodes every image once, before training, and keeps the latents in memory or in files beside the images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from library.caching import store
from library.caching.encode_missing import (
    MOST_NAMED,
    Encoder,
    OnError,
    batches,
    encode_missing,
    report_missing,
    write_files,
)
from library.caching.entry import (
    ALPHA,
    FLIPPED,
    LATENTS,
    MASK,
    CachedLatents,
    CacheRequest,
    Entry,
    Fingerprint,
    Shape,
    image_of,
    shared_stems,
)
from library.caching.latent_files import LatentCache, files_of
from library.data.sample import buckets, images
from library.data.sample.rendering import View, loss_mask, render
from library.errors import UserError
from library.runtime import seeds
from library.runtime.logs import LOGGER
from library.runtime.processes import Processes
from library.types import CacheLayout

if TYPE_CHECKING:
    from library.data.scan.index import FileIndex
    from library.data.types import Record

# Pixels (B, 3, H, W) in [-1, 1] on the CPU, all of one size, and a generator per image, to latents (B, C, h, w).
Encode = Callable[[Tensor, list[torch.Generator]], Tensor]


# ---- what is cached


def cache_in_memory(records: Sequence[Record], encoder: Encoder, layout: CacheLayout) -> list[CachedLatents]:
    """The latents of all records. Several processes share the work; each gets all.

    Raises: UserError: an image cannot be read, or the VAE gives NaN for it.
    """
    requests = requests_of(records)
    owners = dict(zip(requests, records, strict=True))
    jobs, shapes = _in_order(owners), partial(CacheRequest.shapes, layout=layout, in_memory=True)
    processes = encoder.processes
    encoded = dict(_encode(processes.shard(jobs), owners, encoder, shapes))
    if processes.world > 1:
        processes.barrier()
        shares = [Processes(rank, processes.world).shard(jobs) for rank in range(processes.world)]
        sizes = [[shape for one in share for shape in shapes(one).values()] for share in shares]
        sent = [tensor for arrays in encoded.values() for tensor in arrays.values()]
        for share, tensors in zip(shares, processes.broadcast_all(sent, sizes), strict=True):
            rest = iter(tensors)
            encoded |= {one: {name: next(rest) for name in shapes(one)} for one in share}
    return [CachedLatents(encoded[one]) for one in requests]


class CacheResult(NamedTuple):
    """The entries that are on disk afterwards; the same in every process."""

    entries: list[Entry | None]  # by record; None: `on_error` was called for it
    kept: int  # records whose latents were there and fit


def cache_on_disk(
    records: Sequence[Record],
    index: FileIndex,
    encoder: Encoder,
    layout: CacheLayout,
    vae: str,
    *,
    check: bool = True,
    again: bool = False,
    on_error: OnError | None = None,
) -> CacheResult:
    """Makes sure that every record's latents lie beside its image.

    Files that fit are used, whoever made them. The others are named and made again. Several processes share the work,
    file by file. What is done when a run is stopped is there for the next.

    Args:
        vae: fingerprint of the VAE's weights.
        check: False: files are trusted without looking into them (--skip_cache_check).
        again: files that are there are made again, even if they fit.
        on_error: gets images that cannot be read or encoded, and why, in the process that had to encode them; None: the
            first one ends the run.

    Raises: UserError: an image cannot be read, the VAE gives NaN for it, latents without an image cannot be used, or
        a file cannot be written.
    """
    requests, processes = requests_of(records), encoder.processes
    owners = dict(zip(requests, records, strict=True))
    cache = _open_cache(index, layout, vae, [] if again else list(owners), check)
    found = {one: None if again else cache.find(one) for one in owners}
    missing = [one for one, entry in found.items() if not isinstance(entry, Entry)]
    lost = [one for one in missing if not one.present]
    if lost:
        lines = [f"{found[one] or f'{one.image.with_suffix(str())}: no latents'}; there is no image" for one in lost]
        more = [f"and {len(lost) - MOST_NAMED} more like these"] if len(lost) > MOST_NAMED else []
        raise UserError(*lines[:MOST_NAMED], *more, hint="bring the images back, or remove their entries")
    if not again:
        invalid = [entry for entry in found.values() if isinstance(entry, str)]
        report_missing("latents on disk", len(found) - len(missing), invalid, len(missing) - len(invalid))
    processes.barrier()  # no process writes while others still look
    mine = set(processes.shard(sorted({cache.file(one) for one in missing})))
    jobs = _in_order(one for one in missing if cache.file(one) in mine)
    refuse = None if on_error is None else lambda one, error: on_error(one.image, error.problems[0])
    encoded = _encode(jobs, owners, encoder, partial(CacheRequest.shapes, layout=layout), refuse)
    # The index is not for several threads, so what the thread writes is made ready here.
    todo = ((one, cache.file(one), partial(cache.save, one, made, cache.fingerprint(one))) for one, made in encoded)
    written = write_files(todo, mine, encoder.batch_size, refuse)
    for part in processes.all_gather(written):  # waits until all files are there and flushed
        found |= part
    entries = [entry if isinstance(entry := found[one], Entry) else None for one in requests]
    made = set(missing)
    return CacheResult(entries, sum(one not in made for one in requests))


def without_files(records: Sequence[Record], index: FileIndex, layout: CacheLayout) -> Iterator[Path]:
    """The images that have no file of latents, whatever is in it."""
    for one in requests_of(records):
        if all(index.stamp(file) is None for file in files_of(one, layout)):
            yield one.image


def requests_of(records: Sequence[Record]) -> list[CacheRequest]:
    """The request of each record. Records that view an image in the same way have equal ones."""
    shared = shared_stems(records)
    views = [
        CacheRequest(
            image=image_of(record),
            present=record.present,
            shared_stem=record.path in shared,
            size=record.size,
            bucket=record.bucket,
            resized=record.resized,
            crop_ltrb=buckets.crop_ltrb(record.bucket, record.size if record.resized is not None else record.bucket),
            interpolation=record.subset.resize_interpolation,
            flip=False,
            alpha=record.subset.alpha_mask,
            mask=record.mask,
        )
        for record in records
    ]
    mirrored = {view for view, record in zip(views, records, strict=True) if record.flip}
    variants: dict[Any, dict[CacheRequest, str]] = {}
    for view in views:
        # The first view has the name that other programs know, the others one of their own.
        others = variants.setdefault((view.image, view.present, view.bucket), {})
        key = view.resized, view.interpolation, view.alpha, view.mask
        others.setdefault(view, f"~{seeds.derive(0, *map(str, key)) % 16**8:08x}" if others else "")
    return [
        replace(view, flip=view in mirrored, variant=variants[view.image, view.present, view.bucket][view])
        for view in views
    ]


def _open_cache(
    index: FileIndex, layout: CacheLayout, vae: str, requests: Sequence[CacheRequest], check: bool
) -> LatentCache:
    """The cache over what the index knows of its files. Those of `requests` are looked into at once, in parallel."""

    def digests(paths: Sequence[Path]) -> list[str]:
        return index.learn("digest", paths, images.content_digest)

    def fingerprint(one: CacheRequest) -> Fingerprint:
        mask = digests([one.mask])[0] if one.mask is not None else None
        # Latents that cannot be made again are used as they are, whichever VAE made them.
        return Fingerprint(digests([one.image])[0], vae, mask) if one.present else Fingerprint(None, None, mask)

    def summary(file: Path) -> Mapping[str, Any]:
        return index.learn("latents", [file], store.summary)[0]

    cache = LatentCache(layout, fingerprint, summary, index.stamp, check)
    if check:
        files = [file for one in requests for file in files_of(one, layout) if index.stamp(file) is not None]
        contents = index.learn("latents", files, store.summary)
        makers = {
            file: {note.get("vae") for note in (summary.get("provenance") or {}).values()}
            for file, summary in zip(files, contents, strict=True)
        }
        made_by = {one: set().union(*(makers.get(file, ()) for file in files_of(one, layout))) for one in requests}
        noted = [one for one in requests if made_by[one]]
        digests([path for one in noted for path in (one.image if one.present else None, one.mask) if path])
        foreign_vae = sum(not one.present and vae not in made_by[one] for one in noted)
        if foreign_vae:
            LOGGER.warning(
                "%d images do not exist, and their latents were made by another VAE; they are used", foreign_vae
            )
    return cache


# ---- encoding


def _in_order(requests: Iterable[CacheRequest]) -> list[CacheRequest]:
    """One size after the other, so that batches are full and the VAE sees each shape in one run."""
    return sorted(requests, key=lambda one: (one.bucket, one.image))


def _encode(
    jobs: Sequence[CacheRequest],
    owners: Mapping[CacheRequest, Record],
    encoder: Encoder,
    shapes: Callable[[CacheRequest], dict[str, Shape]],
    on_error: Callable[[CacheRequest, UserError], None] | None = None,
) -> Iterator[tuple[CacheRequest, dict[str, Tensor]]]:
    """The arrays that `shapes` names for each job, float32 on the CPU, as caches hold them."""
    if not jobs and encoder.processes.world == 1:
        return

    def view(one: CacheRequest) -> View:
        # The generator is never drawn from: build_specs refuses cached latents where images vary at random.
        return render(replace(owners[one], control=None, inpainting_mask=None), False, Random(0))

    def encode(group: list[CacheRequest], views: list[View]) -> list[dict[str, Tensor] | UserError]:
        pixels = [images.to_pixels(one.pixels) for one in views]
        plain = _run(group, pixels, encoder, "plain")
        mirrored = [number for number, one in enumerate(group) if one.flip]
        turned = [pixels[number].flip(-1) for number in mirrored]
        chosen = [group[number] for number in mirrored]
        flipped = dict(zip(mirrored, _run(chosen, turned, encoder, "flipped"), strict=True))
        results: list[dict[str, Tensor] | UserError] = []
        for number, (one, seen) in enumerate(zip(group, views, strict=True)):
            made = {LATENTS: plain[number]}
            if number in flipped:
                made[FLIPPED] = flipped[number]
            if not all(torch.isfinite(latents).all() for latents in made.values()):
                why = f"{one.image}: the VAE gives NaN or infinite latents"
                results.append(UserError(why, hint="--no_half_vae encodes in float32"))
                continue
            wanted = shapes(one)
            if ALPHA in wanted:
                made[ALPHA] = torch.from_numpy(seen.alpha.astype(np.float32) / 255)
            if MASK in wanted:
                made[MASK] = functional.adaptive_avg_pool2d(loss_mask(seen), plain[number].shape[-2:])[0]
            results.append({name: made[name] for name in wanted})
        return results

    groups = list(batches(jobs, encoder.batch_size, lambda one: one.bucket))
    bar = encoder.progress(total=len(jobs), desc="caching latents", unit="images")
    yield from encode_missing(groups, view, encode, bar, workers=encoder.workers, on_error=on_error)


def _run(group: Sequence[CacheRequest], pixels: Sequence[Tensor], encoder: Encoder, side: str) -> list[Tensor]:
    if not group:
        return []
    # By name, so that an image's latents do not depend on its neighbours, on the order or on the process.
    rngs = [seeds.generator("cpu", encoder.seed, "latents", one.image.name, *one.bucket, side) for one in group]
    with torch.no_grad():
        latents = encoder.encode(torch.stack(list(pixels)), rngs).float().cpu()
    return [one.clone() for one in latents]  # each its own memory: a view would keep the batch
