"""Makes the images of requests: batches through the model, and files written while the next batch is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from library.inference.generate import (
    MakeNoise,
    decode,
    sample_latents,
    settings_of,
    total_steps,
    warn_of_overflow,
)
from library.inference.guidance import texts_read
from library.inference.images import to_images

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from library.generation.highres import Highres
    from library.generation.model import Model
    from library.generation.requests import Request
    from library.inference.prompts import SamplePrompt
    from library.options.inference import PrecisionOptions

_AHEAD = 1  # batches that may wait to be decoded, so that memory stays flat


@dataclass(frozen=True)
class Drawn:
    """An image with what it was made with."""

    request: Request
    prompt: SamplePrompt  # as it was drawn, which is otherwise than requested where images are drawn twice
    image: Image
    networks: list[tuple[str, float]]  # names and strengths
    stage: str  # "" where images are drawn once, "0" for the first and "1" for the second drawing


Receive = Callable[[Drawn], None]  # called from another thread


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
    highres: Highres | None = None
    keeps_first: bool = False  # of two drawings

    def decoding_dtype(self, model: Model) -> torch.dtype:
        return torch.float32 if self.vae_float32 else model.dtype

    def steps(self, requests: Iterable[Request]) -> int:
        """The steps that are made for all of these."""
        prompts = [request.prompt for request in requests]
        if self.highres is None:
            return total_steps(prompts)
        return sum(total_steps([self.highres.first(prompt), self.highres.second(prompt)]) for prompt in prompts)


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
    # Where it is about memory nothing overlaps; encoding must not find tiles switched on either.
    ahead = 0 if how.tiles or model.offload else _AHEAD
    with ThreadPoolExecutor(1, "decoding") as decoding:
        waiting: list[Future[None]] = []
        try:
            for batch in in_batches(requests, how.batch_size):
                while len(waiting) > ahead or (waiting and waiting[0].done()):
                    waiting.pop(0).result()
                model.networks.use(batch[0].prompt.multipliers, strengths)
                for drawing in _drawings(model, batch, how, progress):
                    waiting.append(decoding.submit(_finish, model, batch, drawing, how, receive))
                    if not ahead:
                        waiting.pop().result()
            for one in waiting:
                one.result()
        except BaseException:
            for one in waiting:
                one.cancel()
            raise


@dataclass(frozen=True)
class _Drawing:
    """Latents of a batch that are to become files."""

    prompts: list[SamplePrompt]
    latents: Tensor
    networks: list[tuple[str, float]]
    stage: str


def _drawings(
    model: Model, batch: Sequence[Request], how: HowToDraw, progress: Callable[[int], object]
) -> Iterator[_Drawing]:
    prompts, networks, stage = [request.prompt for request in batch], model.networks.called(), ""
    if how.highres is not None:
        first = [how.highres.first(prompt) for prompt in prompts]
        latents = _latents(model, first, how, progress)
        if how.keeps_first:
            yield _Drawing(first, latents, networks, "0")
        prompts, stage = how.highres.with_first(model, prompts, latents, how.decoding_dtype(model)), "1"
    yield _Drawing(prompts, _latents(model, prompts, how, progress), networks, stage)


def _latents(
    model: Model, prompts: Sequence[SamplePrompt], how: HowToDraw, progress: Callable[[int], object]
) -> Tensor:
    cached = model.conditioning([text for prompt in prompts for text in texts_read(prompt)])
    model.bring(model.models.denoiser, model.models.vae)
    with model.in_regions_of(prompts[0]):
        return sample_latents(
            model.family,
            model.without_texts,
            prompts,
            model.device,
            model.dtype,
            zero_terminal_snr=how.zero_terminal_snr,
            zero_offset=how.zero_offset,
            cached=cached,
            denoise=model.denoise,
            noise=how.noise,
            at_step=None if model.control is None else model.control.at_step,
            progress=progress,
        )


def _finish(model: Model, batch: Sequence[Request], drawing: _Drawing, how: HowToDraw, receive: Receive) -> None:
    """Decodes a batch and gives its images away."""
    vae = model.models.vae
    model.bring(vae)
    if how.tiles:  # square ones, about that many below each other, which overlap by a quarter
        side = 4 * math.ceil(drawing.latents.shape[-2] / (0.75 * how.tiles) / 4)
        vae.enable_tiling()
        vae.tile_latent_min_size, vae.tile_sample_min_size = side, side * model.family.traits.latent_stride
    for start in range(0, len(batch), how.decoded_at_once):
        some = slice(start, start + how.decoded_at_once)
        pixels = decode(model.family, model.models, drawing.latents[some], how.decoding_dtype(model))
        warn_of_overflow(drawing.prompts[some], pixels)
        for request, prompt, image in zip(batch[some], drawing.prompts[some], to_images(pixels), strict=True):
            receive(Drawn(request, prompt, image, drawing.networks, drawing.stage))
    if how.tiles:
        vae.disable_tiling()
