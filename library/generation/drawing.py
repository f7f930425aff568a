"""Makes the images of requests: batches through the model, and files written while the next batch is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from library.inference.generate import MakeNoise, decode, sample_latents, settings_of, warn_of_overflow
from library.inference.images import to_images

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from library.generation.model import Model
    from library.generation.requests import Request
    from library.options.inference import PrecisionOptions

_AHEAD = 1  # batches that may wait to be decoded, so that memory stays flat

# Takes a request, its image, and the networks' names and strengths; called from another thread.
Receive = Callable[["Request", "Image", list[tuple[str, float]]], None]


@dataclass(frozen=True)
class HowToDraw:
    """What holds for all images of a run."""

    batch_size: int
    decoded_at_once: int  # images
    vae_float32: bool
    tiles: int | None  # below each other, in decoding
    zero_terminal_snr: bool = False
    zero_offset: bool = False
    noise: MakeNoise | None = None


def decoded_at_once(precision: PrecisionOptions, batch_size: int) -> int:
    """--vae_batch_size in images."""
    asked = precision.vae_batch_size
    if asked is None:
        return batch_size
    return max(1, int(batch_size * asked)) if asked < 1 else int(asked)


def in_batches(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
    """Full batches of requests that can be made together, in the order of their first ones."""
    waiting: dict[object, list[Request]] = {}
    groups: list[list[Request]] = []
    for request in requests:
        settings = settings_of(request.prompt)
        group = waiting.get(settings)
        if group is None or len(group) == size:
            group = waiting[settings] = []
            groups.append(group)
        group.append(request)
    yield from groups


def draw(
    model: Model,
    requests: Sequence[Request],
    how: HowToDraw,
    strengths: Sequence[float],
    receive: Receive,
    progress: Callable[[int], object],
) -> None:
    """Makes every image and gives it to `receive`, from one thread, while the next ones are drawn.

    Args:
        strengths: of the networks, for prompts that say nothing of them.
        progress: as for `sample_latents`.
    """
    ahead = 0 if how.tiles else _AHEAD  # with tiles it is about memory, and encoding must not find them switched on
    with ThreadPoolExecutor(1, "decoding") as decoding:
        waiting: list[Future[None]] = []
        try:
            for batch in in_batches(requests, how.batch_size):
                while len(waiting) > ahead or (waiting and waiting[0].done()):
                    waiting.pop(0).result()
                model.networks.use(batch[0].prompt.multipliers, strengths)
                latents = _latents(model, batch, how, progress)
                waiting.append(decoding.submit(_finish, model, batch, latents, how, model.networks.called(), receive))
            for one in waiting:
                one.result()
        except BaseException:
            for one in waiting:
                one.cancel()
            raise


def _latents(model: Model, batch: Sequence[Request], how: HowToDraw, progress: Callable[[int], object]) -> Tensor:
    prompts = [request.prompt for request in batch]
    texts = [text for prompt in prompts for text in (prompt.prompt, prompt.negative_prompt, "")]
    return sample_latents(
        model.family,
        model.without_texts,
        prompts,
        model.device,
        model.dtype,
        zero_terminal_snr=how.zero_terminal_snr,
        zero_offset=how.zero_offset,
        cached=model.conditioning(texts),
        denoise=model.denoise,
        noise=how.noise,
        progress=progress,
    )


def _finish(
    model: Model,
    batch: Sequence[Request],
    latents: Tensor,
    how: HowToDraw,
    networks: list[tuple[str, float]],
    receive: Receive,
) -> None:
    """Decodes a batch and gives its images away."""
    dtype = torch.float32 if how.vae_float32 else model.dtype
    if how.tiles:
        _tile(model, latents, how.tiles)
    for start in range(0, len(batch), how.decoded_at_once):
        some = batch[start : start + how.decoded_at_once]
        part = latents[start : start + how.decoded_at_once]
        pixels = decode(model.family, model.models, part, dtype)
        warn_of_overflow([request.prompt for request in some], pixels)
        for request, image in zip(some, to_images(pixels), strict=True):
            receive(request, image, networks)
    if how.tiles:
        model.models.vae.disable_tiling()


def _tile(model: Model, latents: Tensor, rows: int) -> None:
    """Lets the VAE decode in square tiles, about `rows` below each other, which overlap by a quarter."""
    vae, stride = model.models.vae, model.family.traits.latent_stride
    side = 4 * math.ceil(latents.shape[-2] / (0.75 * rows) / 4)
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = side, side * stride
