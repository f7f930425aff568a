"""What a network may adapt in SDXL. U-Net names in LoRA files are those of single files, as the key map has them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from library.families.shared.targets import (
    CONV_CONTAINERS,
    LAST_NORM,
    UNET_CONTAINERS,
    UNET_ENDS,
    layers,
    lora_key,
    norms,
)
from library.families.shared.unet import map_of_config
from library.types import LoraTarget

if TYPE_CHECKING:
    from torch import nn

SIZE_EMBEDDING = ("add_embedding.linear_1", "add_embedding.linear_2")
PER_WAY = 9  # numbered blocks on the way down, and on the way up
FIRST_BLOCKS = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}  # in block-wise lists


def unet_targets(denoiser: nn.Module) -> list[LoraTarget]:
    """The layers of transformers and, marked `conv_only`, those of resnets and samplers.

    Then, marked `optional`, the norms, which LyCORIS adapts, and `from_file` the layers at both ends and the last norm.
    Aliases are diffusers' names, which some trainers write.
    """
    keys, containers = map_of_config(denoiser.config, prefix=""), UNET_CONTAINERS + CONV_CONTAINERS

    def target(path: str, **kind: Any) -> LoraTarget:
        key, alias = lora_key("unet", keys.file_name(path)), lora_key("unet", path)
        return LoraTarget(key, "denoiser", (path,), alias=alias, **kind)

    inside = [
        target(path, conv_only=container in CONV_CONTAINERS, block=block_index(keys.file_name(path)))
        for container, path in layers(denoiser, containers)
    ]
    inner_norms = [target(path, optional=True, norm=True) for _, path in norms(denoiser, containers)]
    ends = [target(path, optional=True, from_file=True) for path in (*UNET_ENDS, *SIZE_EMBEDDING)]
    return [*inside, *inner_norms, *ends, target(LAST_NORM, optional=True, from_file=True, norm=True)]


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
