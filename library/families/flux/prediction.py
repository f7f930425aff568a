"""Latents as the denoiser's tokens and back, where the tokens are, the attention mask, and unrounded timesteps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.families.flux.options import FluxOptions
    from library.types import Batch, TextCond

# What the denoiser takes from the text, by the names that cache files have.
POOLED, T5_OUT, TXT_IDS, T5_MASK = "l_pooled", "t5_out", "txt_ids", "t5_attn_mask"


def pack_latents(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) with even h and w to one token for each 2 x 2 patch, (B, h/2 * w/2, 4C), by rows."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack_latents`. Args: height, width: of the latents."""
    batch, _, numbers = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, numbers // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, numbers // 4, height, width)


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """The positions of the tokens of latents of this size: (0, row, column) of each, (h/2 * w/2, 3), float32."""
    import torch

    rows, columns = torch.meshgrid(
        torch.arange(height // 2, device=device, dtype=torch.float32),
        torch.arange(width // 2, device=device, dtype=torch.float32),
        indexing="ij",
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)


def asked_guidance(family: FluxOptions, batch: Batch | None) -> float:
    """The guidance value for distilled models: the batch's, else that of --guidance_scale."""
    return family.guidance_scale if batch is None or batch.guidance is None else batch.guidance


def model_inputs(
    net: nn.Module, noisy: Tensor, timesteps: Tensor, cond: TextCond, guidance: float
) -> dict[str, Tensor | None]:
    """What the denoiser, and a ControlNet of it, take, by the names of diffusers.

    Args:
        net: one of them; it says whether it takes guidance.
        noisy, timesteps, cond: see `Denoiser.predict`.
    """
    height, width = noisy.shape[-2:]
    return {
        "hidden_states": pack_latents(noisy),
        "encoder_hidden_states": cond.tensors[T5_OUT].to(noisy.dtype),
        "pooled_projections": cond.tensors[POOLED].to(noisy.dtype),
        "timestep": timesteps.to(noisy.device) / 1000,
        "img_ids": image_ids(height, width, noisy.device),
        "txt_ids": cond.tensors[TXT_IDS][0].float(),
        "guidance": noisy.new_full((len(noisy),), float(guidance)) if net.config.guidance_embeds else None,
    }


def attention_mask(text_mask: Tensor, image_tokens: int) -> Tensor:
    """The attention mask of text and image together: text as its mask says, the image always.

    Args:
        text_mask: (B, L), not 0 for what is seen.
    Returns: (B, L + image_tokens) bool, True for what is seen; the text comes first, as in every block. With two
        axes it means the same to all of diffusers' attention backends; a boolean mask with four does not to xformers.
    """
    from torch.nn import functional as F

    return F.pad(text_mask != 0, (0, image_tokens), value=True)


@contextmanager
def unrounded_timesteps(denoiser: nn.Module, timesteps: Tensor, guidance: Tensor | None) -> Iterator[None]:
    """A context in which the denoiser embeds these timesteps and guidance in float32, without rounding.

    diffusers rounds both to the dtype of the computation first: in bfloat16 timesteps are then off by up to 0.2%.

    Args:
        timesteps: (B,), from 0 to 1000.
        guidance: (B,), or None for models without a guidance embedding.
    """
    embedding, exact = denoiser.time_text_embed, timesteps.float()
    inputs = (exact,) if guidance is None else (exact, guidance.float() * 1000)
    if embedding not in _EXACT_INPUTS:  # one hook for good: graphs that were compiled or captured know of it
        embedding.register_forward_pre_hook(_replace_inputs)
    _EXACT_INPUTS[embedding] = inputs
    try:
        yield
    finally:
        _EXACT_INPUTS[embedding] = None


_EXACT_INPUTS: WeakKeyDictionary[nn.Module, tuple[Tensor, ...] | None] = WeakKeyDictionary()


def _replace_inputs(embedding: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    exact = _EXACT_INPUTS.get(embedding)
    return None if exact is None else (*exact, args[-1])
