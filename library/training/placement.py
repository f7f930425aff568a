"""Where the parts of a model live, and in which number format, while something is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from library.options.base import Options
    from library.types import Models

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def has_trained_weights(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def place(models: Models, opts: Options, device: torch.device, *, grad_text: bool) -> None:
    """Moves every part to `device`; frozen ones in the mixed-precision format, trained ones in float32.

    The VAE stays in float32 with --no_half_vae, and on the CPU in any case: half precision there is slower.
    """
    half = WEIGHT_DTYPES[opts.memory.mixed_precision]
    for part in (models.denoiser, *models.text_encoders.values()):
        part.to(device, torch.float32 if has_trained_weights(part) else half)
    if models.vae is not None:
        whole = opts.model.no_half_vae or device.type == "cpu"
        models.vae.to(device, torch.float32 if whole else half)
    if opts.memory.gradient_checkpointing:
        models.denoiser.enable_gradient_checkpointing()
        if grad_text:
            for encoder in models.text_encoders.values():
                encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


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
