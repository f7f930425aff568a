"""Loss masks: which parts of an image count."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def mask_loss(loss: Tensor, masks: Tensor) -> Tensor:
    """Multiplies an elementwise loss by masks at the loss's own resolution.

    What is masked out lowers the item's mean: nothing is renormalised.

    Args:
        loss: (B, C, h, w).
        masks: weight of each pixel, (B, 1, H, W), in [0, 1]; every latent position takes the mean of its area.
    """
    return loss * functional.interpolate(masks.to(loss), size=loss.shape[-2:], mode="area")
