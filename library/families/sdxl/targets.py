"""What a network may adapt in SDXL. U-Net names in LoRA files are those of single files, as the key map has them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from library.families.shared.targets import CONV_CONTAINERS, UNET_CONTAINERS, layers, lora_key, norms
from library.families.shared.unet import map_of_config
from library.types import LoraTarget

if TYPE_CHECKING:
    from torch import nn

PER_WAY = 9  # numbered blocks on the way down, and on the way up
FIRST_BLOCKS = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}  # in block-wise lists


def unet_targets(denoiser: nn.Module) -> list[LoraTarget]:
    """The layers of transformers and, marked `conv_only`, those of resnets and samplers.

    Then, marked `optional`, the norms, which LyCORIS adapts. Aliases are diffusers' names, which some trainers write.
    """
    keys = map_of_config(denoiser.config, prefix="")
    targets = []
    for container, path in layers(denoiser, UNET_CONTAINERS + CONV_CONTAINERS):
        name = keys.file_name(path)
        targets.append(
            LoraTarget(
                lora_key("unet", name),
                "denoiser",
                (path,),
                conv_only=container in CONV_CONTAINERS,
                block=block_index(name),
                alias=lora_key("unet", path),
            )
        )
    for _, path in norms(denoiser, UNET_CONTAINERS + CONV_CONTAINERS):
        key, alias = lora_key("unet", keys.file_name(path)), lora_key("unet", path)
        targets.append(LoraTarget(key, "denoiser", (path,), alias=alias, optional=True, norm=True))
    return targets


def block_index(name: str) -> int | None:
    """The entry of 23 in a block-wise list that a U-Net module belongs to; None: none.

    The first entry is that of the embeddings, the last that of the output layer, which are not adapted.

    Args:
        name: of the module in single files, without prefix.
    """
    match = re.match(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.", name)
    if match is None or int(match[2]) >= PER_WAY:
        return None
    return FIRST_BLOCKS[match[1]] + int(match[2])
