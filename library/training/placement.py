"""Where the parts of a model live, and in which number format, while something is trained."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.memory.low_precision import keep_in_fp8
from library.memory.offload import offloading_checkpoint
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from library.options.base import Options
    from library.types import Models

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def has_trained_weights(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def loading(opts: Options, device: torch.device) -> AbstractContextManager:
    """Within it models are loaded: with --lowram to `device`, which is then torch's default device, else to the CPU."""
    if not opts.memory.lowram:
        return nullcontext()
    if device.type == "cpu":
        LOGGER.warning("--lowram: no effect on a CPU; the model is in main memory anyway")
        return nullcontext()
    return device


def trained_dtype(opts: Options) -> torch.dtype:
    """Number format of what is trained, and of its gradients."""
    full = opts.memory.full_fp16 or opts.memory.full_bf16
    return WEIGHT_DTYPES[opts.memory.mixed_precision] if full else torch.float32


def place(models: Models, opts: Options, device: torch.device, *, grad_text: bool) -> None:
    """Moves every part to `device`; frozen ones in the mixed-precision format, trained ones as `trained_dtype` says.

    The VAE stays in float32 with --no_half_vae, and on the CPU in any case: half precision there is slower.
    """
    half = WEIGHT_DTYPES[opts.memory.mixed_precision]
    encoders = list(models.text_encoders.values())
    for part in (models.denoiser, *encoders):
        if opts.memory.fp8_base or (opts.memory.fp8_base_unet and part is models.denoiser):
            keep_in_fp8(part)  # from float32, and before it is moved: rounded once, and small when it arrives
        part.to(device, trained_dtype(opts) if has_trained_weights(part) else half)
    if models.vae is not None:
        whole = opts.model.no_half_vae or device.type == "cpu"
        models.vae.to(device, torch.float32 if whole else half)
    if opts.memory.gradient_checkpointing:
        if _offloads(opts, device):
            models.denoiser.enable_gradient_checkpointing(offloading_checkpoint(device))
        else:
            models.denoiser.enable_gradient_checkpointing()
        if grad_text:
            for encoder in encoders:
                encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _offloads(opts: Options, device: torch.device) -> bool:
    if opts.memory.cpu_offload_checkpointing and device.type == "cpu":
        LOGGER.warning("--cpu_offload_checkpointing: no effect on a CPU; activations are in main memory anyway")
        return False
    return opts.memory.cpu_offload_checkpointing


def place_trained(trained: nn.Module, opts: Options, device: torch.device) -> None:
    """Moves what is trained to `device`, in the format of `trained_dtype`. Buffers, such as alphas, keep theirs."""
    trained.to(device)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(trained_dtype(opts))


def training_modes(models: Models, trained: nn.Module, *, grad_text: bool) -> None:
    """Train mode where it matters: what is trained, and what recomputes its activations, which asks for it."""
    models.denoiser.train()
    for encoder in models.text_encoders.values():
        encoder.train(grad_text)
    trained.train()


def release_vae(models: Models, opts: Options) -> None:
    """After latents are cached the VAE is needed for sample pictures only; --highvram keeps it on the device."""
    if models.vae is not None and not opts.memory.highvram:
        models.vae.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
