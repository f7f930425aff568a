"""Makes the images of requests: batches through the model, and files written while the next batch is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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
from library.memory.sliced_decoding import in_slices

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from library.generation.highres import Highres
    from library.generation.model import Model
    from library.generation.requests import Request
    from library.inference.deep_shrink import DeepShrink
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
    slices: int | None  # below each other, in decoding
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
    ahead = 0 if how.slices or model.offload else _AHEAD  # where it is about memory nothing overlaps
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
    with model.in_regions_of(prompts[0]), _deep_shrink(model, prompts[0].shrink) as at_timestep:
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
            at_timestep=at_timestep,
            progress=progress,
        )


@contextmanager
def _deep_shrink(model: Model, shrink: DeepShrink) -> Iterator[Callable[[float], object] | None]:
    """Inside, Deep Shrink acts on the denoiser and on ControlNets; it has to know each timestep. None: it is off."""
    if shrink.depth_1 is None:
        yield None
        return
    nets = [model.models.denoiser, *(model.control.nets if model.control is not None else ())]
    assert model.family.shrinking is not None, "checked with the prompts"
    with model.family.shrinking(nets, shrink.ratio) as set_depth:
        yield lambda timestep: set_depth(shrink.depth_at(timestep))


def _finish(model: Model, batch: Sequence[Request], drawing: _Drawing, how: HowToDraw, receive: Receive) -> None:
    """Decodes a batch and gives its images away."""
    vae = model.models.vae
    model.bring(vae)
    for start in range(0, len(batch), how.decoded_at_once):
        some = slice(start, start + how.decoded_at_once)
        with in_slices(vae.decoder, how.slices):
            pixels = decode(model.family, model.models, drawing.latents[some], how.decoding_dtype(model))
        warn_of_overflow(drawing.prompts[some], pixels)
        for request, prompt, image in zip(batch[some], drawing.prompts[some], to_images(pixels), strict=True):
            receive(Drawn(request, prompt, image, drawing.networks, drawing.stage))
