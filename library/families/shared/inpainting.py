"""U-Nets that read a mask and the rest of the image beside noisy latents: made from those that read latents alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.families.shared.unet import CHANNELS, INPAINTING_CHANNELS, reads_masks
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from torch import nn

    from library.options.base import Options


def fit_for_inpainting(unet: nn.Module | None, opts: Options) -> bool:
    """Widens the U-Net where --train_inpainting asks for it. Returns: whether it reads masks (`Models.inpaints`)."""
    if unet is None:
        return False
    if opts.data.train_inpainting and not reads_masks(unet):
        widen_input(unet)
        if opts.method.trains_model:
            LOGGER.info(
                "--train_inpainting: the U-Net gets %d inputs in place of %d, the new ones with weights of 0",
                *(INPAINTING_CHANNELS, CHANNELS),
            )
        else:
            LOGGER.warning(
                "--train_inpainting: the base model has no inputs for a mask. It gets some with weights of 0, and "
                "nothing trains them here, so that masks have no effect; begin with a model for inpainting, or make "
                "one by training the whole model"
            )
    return reads_masks(unet)


def widen_input(unet: nn.Module) -> None:
    """Gives a UNet2DConditionModel inputs for a mask and the latents of the masked image, in place.

    Weights of the old inputs and the bias stay as they are and those of the new ones are 0, so that predictions are
    the same until it is trained.
    """
    import torch
    from torch import nn

    old = unet.conv_in
    weight = old.weight.detach()
    added = torch.zeros_like(weight[:, :1]).expand(-1, INPAINTING_CHANNELS - CHANNELS, -1, -1)
    new = nn.Conv2d(
        INPAINTING_CHANNELS, old.out_channels, old.kernel_size, padding=old.padding, device="meta", dtype=weight.dtype
    )
    new.weight = nn.Parameter(torch.cat([weight, added], dim=1), requires_grad=old.weight.requires_grad)
    new.bias = old.bias
    unet.conv_in = new.train(old.training)
    unet.register_to_config(in_channels=INPAINTING_CHANNELS)
