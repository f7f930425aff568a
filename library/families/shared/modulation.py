"""The modulation of transformers as diffusers builds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from library.types import Models


def modulation(models: Models) -> tuple[str, dict[str, nn.Module]]:
    """The path of what embeds time, guidance and pooled text, and by path the linear layers that read it alone."""
    from diffusers.models import normalization

    kinds = (
        normalization.AdaLayerNormZero,
        normalization.AdaLayerNormZeroSingle,
        normalization.AdaLayerNormContinuous,
        normalization.SD35AdaLayerNormZeroX,
    )
    found = {path: module for path, module in models.denoiser.named_modules() if isinstance(module, kinds)}
    return "time_text_embed", {f"{path}.linear": module.linear for path, module in found.items()}
