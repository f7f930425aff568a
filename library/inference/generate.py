"""Images from prompts, with any family: guidance, denoising and decoding. Never asks which family it has."""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from library.inference.control_images import control_batch
from library.inference.images import to_images
from library.inference.placement import in_float32
from library.inference.prompts import SamplePrompt
from library.inference.samplers import make_flow_scheduler, make_scheduler
from library.runtime.logs import LOGGER
from library.types import Batch, Denoise, Models, TextCond

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from library.families.base import Family
    from library.types import FamilyTraits

Progress = Callable[[int], object]


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
    for group in _batches(prompts, batch_size):
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
        for prompt, finite in zip(group, pixels.isfinite().flatten(1).all(1).tolist(), strict=True):
            if not finite:
                LOGGER.warning(f"the image of {prompt.prompt!r} holds NaN or infinite values (overflow?)")
        images += to_images(pixels)
    return images


def total_steps(prompts: Sequence[SamplePrompt]) -> int:
    """The number of steps that `progress` counts in all."""
    return sum(prompt.steps for prompt in prompts)


@torch.no_grad()
def sample_latents(
    family: Family,
    models: Models,
    prompts: Sequence[SamplePrompt],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    zero_terminal_snr: bool = False,
    cached: Mapping[str, TextCond] | None = None,
    denoise: Denoise | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Denoised latents, (B, C, H/8, W/8), float32, scaled; of prompts as `_batches` puts them together."""
    first, prediction_type = prompts[0], family.denoiser.prediction_type()
    if prediction_type == "flow":
        scheduler = make_flow_scheduler(steps=first.steps, shift=flow_shift(family.traits, first), device=device)
    else:
        scheduler = make_scheduler(
            first.sampler,
            steps=first.steps,
            prediction_type=prediction_type,
            zero_terminal_snr=zero_terminal_snr,
            device=device,
        )
    generators = [torch.Generator("cpu").manual_seed(with_seed(prompt).seed) for prompt in prompts]
    step_extras = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    latents = initial_noise(prompts, family.traits, generators).to(device)
    # The scheduler for flow has neither: it starts from plain noise, and the denoiser takes latents as they are.
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    as_input = getattr(scheduler, "scale_model_input", lambda sample, _: sample)
    with _precision(device, dtype):
        guidance = _Guidance.of(
            family, models, prompts, device, cached, denoise or partial(family.denoiser.predict, models)
        )
        evaluations = len(scheduler.timesteps)  # of the denoiser; some samplers need more than one per step
        for index, timestep in enumerate(scheduler.timesteps):
            prediction = guidance.predict(as_input(latents, timestep), timestep)
            latents = scheduler.step(prediction, timestep, latents, **step_extras).prev_sample.float()
            completed = (index + 1) * first.steps // evaluations - index * first.steps // evaluations
            if progress is not None and completed:
                progress(completed * len(prompts))
    return latents


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


def _conditioning(
    family: Family, models: Models, texts: list[str], device: torch.device, cached: Mapping[str, TextCond] | None
) -> TextCond:
    if cached is None:
        return family.text.encode(models, texts, emphasis=True)
    found = TextCond.cat([cached[text] for text in texts]).map(lambda tensor: tensor.to(device))
    return family.text.encode(models, texts, emphasis=True, cached=found) if models.text_encoders else found


@dataclass(frozen=True)
class _Guidance:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) over a batch of prompts."""

    denoise: Denoise
    positive: TextCond
    negative: TextCond | None  # None: scale 1, where the unconditional half would cancel out
    scale: float
    sizes: Batch
    sizes_twice: Batch  # for both halves in one pass

    @staticmethod
    def of(
        family: Family,
        models: Models,
        prompts: Sequence[SamplePrompt],
        device: torch.device,
        cached: Mapping[str, TextCond] | None,
        denoise: Denoise,
    ) -> _Guidance:
        scale = prompts[0].scale
        positive = _conditioning(family, models, [prompt.prompt for prompt in prompts], device, cached)
        negative = None
        if scale != 1.0:
            negative = _conditioning(family, models, [prompt.negative_prompt for prompt in prompts], device, cached)
        sizes, sizes_twice = _sizes(prompts, device), _sizes([*prompts, *prompts], device)
        return _Guidance(denoise, positive, negative, scale, sizes, sizes_twice)

    def predict(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        """float32, (B, C, h, w)."""
        if self.negative is None:
            return self._predict(noisy, timestep, self.positive, self.sizes)
        negative, positive = self.negative.tensors, self.positive.tensors
        if all(value.shape[1:] == positive[name].shape[1:] for name, value in negative.items()):
            both = TextCond.cat([self.negative, self.positive])
            prediction = self._predict(torch.cat([noisy, noisy]), timestep, both, self.sizes_twice)
            without, with_text = prediction.chunk(2)
        else:
            without = self._predict(noisy, timestep, self.negative, self.sizes)
            with_text = self._predict(noisy, timestep, self.positive, self.sizes)
        return without + self.scale * (with_text - without)

    def _predict(self, noisy: Tensor, timestep: Tensor, cond: TextCond, sizes: Batch) -> Tensor:
        timesteps = timestep.to(noisy.device).expand(len(noisy))
        return self.denoise(noisy, timesteps, cond, sizes).float()


def _sizes(prompts: Sequence[SamplePrompt], device: torch.device) -> Batch:
    """The size, guidance and control conditioning of the images: uncropped, of the requested size."""
    sizes = torch.tensor([(prompt.width, prompt.height) for prompt in prompts], device=device)
    return Batch(
        captions=[prompt.prompt for prompt in prompts],
        latents=None,
        pixels=None,
        loss_weights=torch.ones(len(prompts), device=device),
        masks=None,
        original_sizes=sizes,
        crop_top_lefts=torch.zeros_like(sizes),
        target_sizes=sizes,
        guidance=prompts[0].guidance,
        control=control_batch(prompts, device),
    )


def _batches(prompts: Sequence[SamplePrompt], size: int) -> list[list[SamplePrompt]]:
    """Runs of neighbours that can be made together, `size` at most; seeds are filled in."""

    def settings(prompt: SamplePrompt) -> tuple[SamplePrompt, bool]:
        return replace(prompt, prompt="", negative_prompt="", seed=0, control=None), prompt.control is not None

    batches: list[list[SamplePrompt]] = []
    for prompt in map(with_seed, prompts):
        if batches and len(batches[-1]) < size and settings(batches[-1][0]) == settings(prompt):
            batches[-1].append(prompt)
        else:
            batches.append([prompt])
    return batches


def _precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)
