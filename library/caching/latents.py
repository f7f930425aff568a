"""Encodes every picture once, before training, and keeps the latents in memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from library.data.dataset import CachedLatents, TrainingData, render
from library.data.images import to_pixels
from library.errors import UserError
from library.runtime import logs
from library.types import Size

if TYPE_CHECKING:
    from pathlib import Path

    from library.data.records import Record

Work = TypeVar("Work")
Result = TypeVar("Result")


class _View(NamedTuple):
    """What latents depend on. Records that agree in it share them."""

    path: Path
    bucket: Size
    resized: Size | None
    interpolation: str | None
    flip: bool


def cache_latents_in_memory(
    data: TrainingData,
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    progress: Callable[..., Any] = logs.progress,
) -> None:
    """Encodes all pictures of `data`, which yields latents from then on. Pictures are decoded ahead in threads.

    Args:
        encode: pixels (B, 3, H, W) in [-1, 1] on the CPU, B up to `batch_size`, one size, to latents (B, C, H/8, W/8).
        progress: makes a progress bar, as `library.runtime.logs.progress` does.

    Raises: UserError: a picture cannot be read, or the VAE gives NaN for it.
    """
    views = list(dict.fromkeys(view for record in data.records for view in _views(record)))
    owners = {view: record for record in data.records for view in _views(record)}
    # One size after the other, so that batches are full and the VAE sees each shape in one run.
    views.sort(key=lambda view: view.bucket)
    latents: dict[_View, Tensor] = {}
    with progress(total=len(views), desc="caching latents", unit="img") as bar, torch.no_grad():
        decoded = _ahead(lambda view: _decode(owners[view], view.flip), views, window=2 * batch_size)
        for group in _batches(views, batch_size):
            pixels = torch.stack([next(decoded) for _ in group])
            encoded = encode(pixels).cpu()
            _refuse_nan(encoded, group)
            latents.update(zip(group, encoded.unbind(), strict=True))
            bar.update(len(group))
    data.set_latents([_latents_of(record, latents) for record in data.records])


def _views(record: Record) -> list[_View]:
    look = (record.path, record.bucket, record.resized, record.subset.resize_interpolation)
    return [_View(*look, flip) for flip in ((False, True) if record.subset.flip_aug else (False,))]


def _latents_of(record: Record, latents: dict[_View, Tensor]) -> CachedLatents:
    plain, *flipped = (latents[view] for view in _views(record))
    return CachedLatents(plain, flipped[0] if flipped else None)


def _decode(record: Record, flip: bool) -> Tensor:
    # The generator is never drawn from: build_specs refuses cached latents where pictures vary by chance.
    return to_pixels(render(record, flip, Random(0)))


def _batches(views: Sequence[_View], batch_size: int) -> Iterator[list[_View]]:
    """Runs of one bucket size, cut to `batch_size`."""
    group: list[_View] = []
    for view in views:
        if group and (len(group) == batch_size or group[0].bucket != view.bucket):
            yield group
            group = []
        group.append(view)
    if group:
        yield group


def _ahead(work: Callable[[Work], Result], todo: Iterable[Work], window: int) -> Iterator[Result]:
    """Results in order, computed in threads; at most `window` plus one per thread are waiting, to bound memory."""
    threads = min(8, os.cpu_count() or 1)
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


def _refuse_nan(latents: Tensor, group: Sequence[_View]) -> None:
    broken = [view for view, latent in zip(group, latents, strict=True) if not torch.isfinite(latent).all()]
    if broken:
        raise UserError(
            *(f"{view.path}: the VAE gives NaN or infinite latents" for view in broken),
            hint="--no_half_vae encodes in float32",
        )
