"""Captions to what Stable Diffusion 3's denoiser takes from the text, by the names that cache files have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.types import TextCond

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

LG_OUT, LG_POOLED, T5_OUT = "lg_out", "lg_pooled", "t5_out"
L_MASK, G_MASK, T5_MASK = "clip_l_attn_mask", "clip_g_attn_mask", "t5_attn_mask"
KEYS = (LG_OUT, LG_POOLED, T5_OUT, L_MASK, G_MASK, T5_MASK)
CACHE_SUFFIX = "_sd3_te.npz"
CLIP_LENGTH = 77  # tokens, with BOS and EOS; also the number of zero rows in place of T5's


def token_mask(ids: Tensor, eos: int) -> Tensor:
    """1 up to the first EOS, 0 for the padding after it; (B, L) int64."""
    is_eos = (ids == eos).long()
    return (is_eos.cumsum(-1) - is_eos == 0).long()


def encode_projected_clip(text_encoder: nn.Module, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token ids (B, 77) to states (B, 77, width) and the pooled, projected vector (B, projection).

    States are those of the layer before the last, without the final norm.

    Args:
        text_encoder: CLIPTextModelWithProjection.
        mask: (B, 77), 0 for padding, which is then hidden from attention; None: all is seen.
    """
    device = text_encoder.device
    found = text_encoder(
        ids.to(device, non_blocking=True),
        attention_mask=None if mask is None else mask.to(device, non_blocking=True),
        output_hidden_states=True,
    )
    layers = text_encoder.config.num_hidden_layers
    assert len(found.hidden_states) == layers + 1, "transformers changed what hidden_states holds"
    return found.hidden_states[layers - 1], found.text_embeds


def context_of(cond: TextCond, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The denoiser's text input: CLIP's rows, padded with zeros, then T5's (B, 77 + L, width), and pooled (B, P).

    Args:
        width: of T5's states.
    """
    import torch
    from torch.nn import functional as F

    clip, t5 = cond.tensors[LG_OUT].to(dtype), cond.tensors[T5_OUT].to(dtype)
    context = torch.cat([F.pad(clip, (0, width - clip.shape[-1])), t5], dim=1)
    return context, cond.tensors[LG_POOLED].to(dtype)


def drop_encoders(cond: TextCond, rates: tuple[float, float, float], clip_l: tuple[int, int]) -> TextCond:
    """Replaces whole encoders' outputs by zeros, each caption's and each encoder's by a draw of its own.

    Draws come from torch's global stream on the tensors' device.

    Args:
        rates: of CLIP-L, CLIP-G and T5, from 0 to 1.
        clip_l: how many columns of `lg_out` and of `lg_pooled` are CLIP-L's.
    """
    import torch

    if not any(rates):
        return cond
    tensors = dict(cond.tensors)
    states = tensors[LG_OUT]
    draws = torch.rand(3, len(states), device=states.device)
    keep_l, keep_g, keep_t5 = (draw >= rate for draw, rate in zip(draws, rates, strict=True))
    for name, columns in zip((LG_OUT, LG_POOLED), clip_l, strict=True):
        own = torch.arange(tensors[name].shape[-1], device=states.device) < columns
        keep = torch.where(own, keep_l[:, None], keep_g[:, None])
        keep = keep[:, None] if tensors[name].dim() == 3 else keep
        tensors[name] = torch.where(keep, tensors[name], 0.0)
    tensors[T5_OUT] = torch.where(keep_t5[:, None, None], tensors[T5_OUT], 0.0)
    return TextCond(tensors)


def published_clip_l(cond: TextCond) -> tuple[int, int]:
    """The number of columns of `lg_out` and of `lg_pooled` that are CLIP-L's in the published models: 768 each."""
    return cond.tensors[LG_OUT].shape[-1] * 3 // 8, cond.tensors[LG_POOLED].shape[-1] * 3 // 8


def cached_clip(cond: TextCond, number: int, clip_l: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(states, pooled) and mask of CLIP-L (0) or CLIP-G (1), taken out of a conditioning. `clip_l`: `drop_encoders`."""
    columns = [slice(count) if number == 0 else slice(count, None) for count in clip_l]
    states, pooled = (cond.tensors[name][..., own] for name, own in zip((LG_OUT, LG_POOLED), columns, strict=True))
    return (states, pooled), cond.tensors[(L_MASK, G_MASK)[number]]


def conditioning(
    states: Sequence[Tensor], pooled: Sequence[Tensor], masks: Sequence[Tensor], t5: Tensor, t5_mask: Tensor
) -> TextCond:
    """The conditioning from the outputs of CLIP-L and CLIP-G, in this order, and of T5."""
    import torch

    device = states[0].device
    return TextCond(
        {
            LG_OUT: torch.cat(list(states), dim=-1),
            LG_POOLED: torch.cat(list(pooled), dim=-1),
            T5_OUT: t5,
            L_MASK: masks[0].to(device),
            G_MASK: masks[1].to(device),
            T5_MASK: t5_mask.to(device),
        }
    )
