"""Images from prompts, with any family: guidance, denoising and decoding. Never asks which family it has."""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from library.inference.control_images import encode_control
from library.inference.growing import enlarging_step, shrunk
from library.inference.guidance import Guidance
from library.inference.images import to_images
from library.inference.placement import in_float32
from library.inference.prompts import SamplePrompt, SizeConditions
from library.inference.samplers import make_flow_scheduler, make_scheduler
from library.inference.source_images import Source, encode_inpainting, encode_sources
from library.runtime.logs import LOGGER
from library.types import Denoise, Models, TextCond

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from PIL.Image import Image
    from torch import Tensor

    from library.families.base import Family
    from library.inference.gradual_latent import Sides
    from library.types import FamilyTraits

Progress = Callable[[int], object]
# Prompts, traits and a generator for each prompt to noise, (B, C, H/s, W/s) float32 on the CPU.
MakeNoise = Callable[[Sequence[SamplePrompt], "FamilyTraits", Sequence[torch.Generator]], "Tensor"]


def generate(
    family: Family,
    models: Models,
    prompts: SamplePrompt | Sequence[SamplePrompt],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    *,
    batch_size: int = 1,
    vae_float32: bool = False,
    zero_terminal_snr: bool = False,
    cached: Mapping[str, TextCond] | None = None,
    denoise: Denoise | None = None,
    progress: Progress | None = None,
) -> list[Image]:
    """One image per prompt, in the prompts' order.

    Every image has its own random stream on the CPU, so that neither the device nor the images beside it in a
    batch change it (apart from rounding).

    Args:
        models: with denoiser, text encoders and VAE on `device`, in eval mode.
        dtype: computing precision; another than float32 turns autocast on. Latents between steps stay float32.
        batch_size: how many neighbours are made at once; they may differ in texts, seed and control image only.
        vae_float32: decodes in float32, for VAEs that overflow in half precision.
        zero_terminal_snr: the model was trained with that schedule.
        cached: the conditioning of every text, as `encode_texts` gave it, where `models` lacks text encoders by now.
        denoise: computes the prediction; None: the family's denoiser alone.
        progress: called with the number of (image, step) pairs just done, e.g. the `update` of a bar of
            `total_steps(prompts)`.
    Raises: UserError: a sampler that cannot run.
    """
    prompts = [prompts] if isinstance(prompts, SamplePrompt) else list(prompts)
    device = torch.device(device)
    images = []
    for group in batches(prompts, batch_size):
        latents = sample_latents(
            family,
            models,
            group,
            device,
            dtype,
            zero_terminal_snr=zero_terminal_snr,
            cached=cached,
            denoise=denoise,
            progress=progress,
        )
        pixels = decode(family, models, latents, torch.float32 if vae_float32 else dtype, widen=vae_float32)
        warn_of_overflow(group, pixels)
        images += to_images(pixels)
    return images


def total_steps(prompts: Iterable[SamplePrompt]) -> int:
    """The number of steps that `progress` counts in all."""
    return sum(prompt.steps_made for prompt in prompts)


def warn_of_overflow(prompts: Sequence[SamplePrompt], pixels: Tensor) -> None:
    """Names the prompts whose pixels, (B, 3, H, W), are not all finite."""
    for prompt, finite in zip(prompts, pixels.isfinite().flatten(1).all(1).tolist(), strict=True):
        if not finite:
            LOGGER.warning(f"the image of {prompt.prompt!r} holds NaN or infinite values (overflow?)")


@torch.no_grad()
def sample_latents(
    family: Family,
    models: Models,
    prompts: Sequence[SamplePrompt],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    zero_terminal_snr: bool = False,
    zero_offset: bool = False,
    cached: Mapping[Any, TextCond] | None = None,
    denoise: Denoise | None = None,
    noise: MakeNoise | None = None,
    at_step: Callable[[float], object] | None = None,
    at_timestep: Callable[[float], object] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Denoised latents, (B, C, H/8, W/8), float32, scaled; of prompts as `batches` puts them together.

    Args:
        zero_offset: see `make_scheduler`.
        cached: the conditioning of each text of `texts_read`.
        noise: draws what drawing begins with; None: `initial_noise`.
        at_step: is called before each evaluation with the share of them that is made after it.
        at_timestep: is called before each evaluation with its timestep.
    """
    scheduler = _scheduler(family, prompts[0], device, zero_terminal_snr=zero_terminal_snr, zero_offset=zero_offset)
    generators = [torch.Generator("cpu").manual_seed(with_seed(prompt).seed) for prompt in prompts]
    step_extras = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    # The schedulers for flow may have none: the denoiser takes latents as they are.
    as_input = getattr(scheduler, "scale_model_input", lambda sample, _: sample)
    with _precision(device, dtype):
        control = encode_control(family, models, prompts, generators, device)
        begin = _beginning(family, models, prompts, scheduler, generators, device, noise or initial_noise)
        timesteps, latents, gradual = begin.timesteps, begin.latents, prompts[0].gradual
        guidance = Guidance.of(
            family, models, prompts, device, cached, denoise or partial(family.denoiser.predict, models), control
        )
        if begin.inpainting is not None:
            guidance = guidance.with_inpainting(begin.inpainting)
        growth: list[Sides | None] = [None] * len(timesteps)
        if gradual.timesteps is not None:
            growth = gradual.growth(timesteps.tolist(), tuple(latents.shape[-2:]))
            latents = shrunk(latents, gradual)
        times = timesteps.tolist() if at_timestep is not None else ()
        steps, evaluations = prompts[0].steps_made, len(timesteps)  # some samplers need more than one per step
        for index, timestep in enumerate(timesteps):
            if at_step is not None:
                at_step((index + 1) / evaluations)
            if at_timestep is not None:
                at_timestep(times[index])
            prediction, size = guidance.predict(as_input(latents, timestep), timestep), growth[index]
            if size is not None:
                latents = enlarging_step(scheduler, prediction, timestep, latents, size, gradual, generators)
            else:
                latents = scheduler.step(prediction, timestep, latents, **step_extras).prev_sample.float()
            if begin.kept is not None:
                latents = begin.kept.keep(latents, scheduler, begin.noise, timesteps[index + 1 : index + 2])
            completed = (index + 1) * steps // evaluations - index * steps // evaluations
            if progress is not None and completed:
                progress(completed * len(prompts))
    return latents


class _Beginning(NamedTuple):
    """What steps begin with."""

    timesteps: Tensor  # of the steps that are made
    latents: Tensor
    noise: Tensor  # that was drawn for them
    kept: Source | None  # of which parts stay as they are; None: there are none
    inpainting: Tensor | None  # see `Batch`; None: the denoiser reads none


def _beginning(
    family: Family,
    models: Models,
    prompts: Sequence[SamplePrompt],
    scheduler: SchedulerMixin,
    generators: list[torch.Generator],
    device: torch.device,
    make_noise: MakeNoise,
) -> _Beginning:
    """Noise alone, or with the image that drawing begins with. Models for inpainting see that, and may do without."""
    source, first = None, prompts[0]
    begins_with_it = first.source is not None and not (models.inpaints and first.strength == 1)
    blends = first.source is not None and first.source.is_masked and (first.source.pinned or not models.inpaints)
    if begins_with_it or blends:
        source = encode_sources(family, models, prompts, generators, device)
    noise = make_noise(prompts, family.traits, generators).to(device)
    # The schedulers for flow may have no such number: they start from plain noise.
    timesteps, latents = scheduler.timesteps, noise * getattr(scheduler, "init_noise_sigma", 1.0)
    if begins_with_it:
        timesteps, latents = _start_from(source, scheduler, first, noise)
    kept = source if blends else None
    inpainting = encode_inpainting(family, models, prompts, generators, device) if models.inpaints else None
    return _Beginning(timesteps, latents, noise, kept, inpainting)


def _scheduler(
    family: Family, prompt: SamplePrompt, device: torch.device, *, zero_terminal_snr: bool, zero_offset: bool
) -> SchedulerMixin:
    prediction_type = family.denoiser.prediction_type()
    if prediction_type == "flow":
        shift = flow_shift(family.traits, prompt)
        return make_flow_scheduler(prompt.sampler, steps=prompt.steps, shift=shift, device=device)
    return make_scheduler(
        prompt.sampler,
        steps=prompt.steps,
        prediction_type=prediction_type,
        zero_terminal_snr=zero_terminal_snr,
        zero_offset=zero_offset,
        device=device,
    )


def _start_from(
    source: Source, scheduler: SchedulerMixin, prompt: SamplePrompt, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The timesteps of the last `steps_made` steps, and the source's latents with the noise that the first has."""
    begin = (prompt.steps - prompt.steps_made) * getattr(scheduler, "order", 1)
    timesteps = scheduler.timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return timesteps, source.noised(scheduler, noise, timesteps[:1])


@torch.no_grad()
def decode(family: Family, models: Models, latents: Tensor, dtype: torch.dtype, *, widen: bool = False) -> Tensor:
    """Pixels (B, 3, H, W), float32, about [-1, 1]. `widen` computes with the VAE's weights in float32."""
    with in_float32(models.vae) if widen else nullcontext(), _precision(latents.device, dtype):
        return family.latents.decode(models, latents).float()


def flow_shift(traits: FamilyTraits, prompt: SamplePrompt) -> float:
    """The shift of a flow model's noise levels: the prompt's, or what the family takes at this size."""
    if prompt.flow_shift is not None:
        return prompt.flow_shift
    if traits.flow_shift is None:
        return 1.0
    return traits.flow_shift(prompt.height // traits.latent_stride, prompt.width // traits.latent_stride)


def initial_noise(
    prompts: Sequence[SamplePrompt], traits: FamilyTraits, generators: Sequence[torch.Generator]
) -> Tensor:
    """Standard normal latents, float32 on the CPU, each image's from its own generator."""
    channels, stride = traits.latent_channels, traits.latent_stride
    shapes = [(channels, prompt.height // stride, prompt.width // stride) for prompt in prompts]
    return torch.stack([torch.randn(s, generator=g) for s, g in zip(shapes, generators, strict=True)])


def with_seed(prompt: SamplePrompt) -> SamplePrompt:
    """The prompt with a seed from the system's entropy where it has none; the global random state is not touched."""
    return prompt if prompt.seed is not None else replace(prompt, seed=secrets.randbits(32))


@torch.no_grad()
def encode_texts(
    family: Family, models: Models, prompts: Sequence[SamplePrompt], dtype: torch.dtype, device: torch.device
) -> dict[str, TextCond]:
    """The conditioning of each text of the prompts, on the CPU, for images made without the text encoders."""
    texts = dict.fromkeys(text for prompt in prompts for text in (prompt.prompt, prompt.negative_prompt))
    with _precision(device, dtype):
        return {
            text: family.text.encode(models, [text], emphasis=True).map(lambda tensor: tensor.cpu()) for text in texts
        }


def batches(prompts: Sequence[SamplePrompt], size: int) -> list[list[SamplePrompt]]:
    """Runs of neighbours that can be made together, `size` at most; seeds are filled in."""

    found: list[list[SamplePrompt]] = []
    for prompt in map(with_seed, prompts):
        if found and len(found[-1]) < size and settings_of(found[-1][0]) == settings_of(prompt):
            found[-1].append(prompt)
        else:
            found.append([prompt])
    return found


def settings_of(prompt: SamplePrompt) -> Hashable:
    """What prompts that are made in one batch must have in common."""
    own = {"prompt": "", "negative_prompt": "", "seed": 0, "sizes": SizeConditions(), "parts": (), "seen": None}
    alike, source = replace(prompt, **own, control=None, guides=(), source=None), prompt.source
    images = prompt.control is not None, len(prompt.guides), source is not None and (True, source.is_masked)
    return alike, images, len(prompt.parts)


def _precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)
