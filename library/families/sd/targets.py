"""What a network may adapt in Stable Diffusion 1.x/2.x, with the names that LoRA files use for it.

U-Net names in these files are diffusers' own, text encoder names are transformers' with the `text_model.` level.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from library.families.shared.targets import CONV_CONTAINERS, UNET_CONTAINERS, clip_targets, layers, lora_key, norms
from library.families.shared.unet import map_of_config
from library.types import LoraTarget

if TYPE_CHECKING:
    from torch import nn

    from library.types import Models

ENDS = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
PER_LEVEL, SAMPLER_PLACE = 3, 2
_WAYS = {"input_blocks": "IN", "output_blocks": "OUT"}  # of blocks' names in XTI files
FIRST_DOWN_BLOCK, MID_BLOCK, FIRST_UP_BLOCK = 1, 12, 13


def text_targets(text_encoder: nn.Module) -> list[LoraTarget]:
    """The linear layers of attention and MLP, in the model's order."""
    return clip_targets(text_encoder, "te")


def unet_targets(denoiser: nn.Module) -> list[LoraTarget]:
    """The layers of transformers and, marked `conv_only`, those of resnets and samplers.

    Then, marked `optional`, the layers at both ends and the norms, which LyCORIS adapts.
    """
    containers = UNET_CONTAINERS + CONV_CONTAINERS
    inside = [
        LoraTarget(lora_key("unet", path), "denoiser", (path,), container in CONV_CONTAINERS, block_index(path))
        for container, path in layers(denoiser, containers)
    ]
    ends = [LoraTarget(lora_key("unet", path), "denoiser", (path,), optional=True) for path in ENDS]
    return (
        inside
        + ends
        + [
            LoraTarget(lora_key("unet", path), "denoiser", (path,), optional=True, norm=True)
            for _, path in norms(denoiser, containers)
        ]
    )


def block_index(path: str) -> int | None:
    """The entry of 25 in a block-wise list that a U-Net module belongs to (entry 0 is unused); None: none.

    Levels count three each, a sampler is the third of its level; down starts at 1, the middle is 12, up starts at 13.
    """
    if path.startswith("mid_block."):
        return MID_BLOCK
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.", path)
    if match is None:
        return None
    way, level, kind, layer = match.groups()
    place = PER_LEVEL * int(level) + (SAMPLER_PLACE if kind.endswith("samplers") else int(layer))
    return (FIRST_DOWN_BLOCK if way == "down" else FIRST_UP_BLOCK) + place


def text_places(models: Models) -> dict[str, list[str]]:
    """The paths of cross-attention layers by the names of their blocks in XTI files, in the denoiser's order.

    The published models have 16: IN01 to IN08 on the way down, MID, and OUT03 to OUT11 on the way up.
    """
    keys, found = map_of_config(models.denoiser.config, prefix=""), {}
    for path, _ in models.denoiser.named_modules():
        if path.endswith(".attn2"):
            kind, number = keys.file_name(f"{path}.to_k").split(".")[:2]
            name = "MID" if kind == "middle_block" else f"{_WAYS[kind]}{int(number):02d}"
            found.setdefault(name, []).append(path)
    return dict(sorted(found.items()))
