"""What a network may adapt in Stable Diffusion 1.x/2.x, with the names that LoRA files use for it.

U-Net names in these files are diffusers' own, text encoder names are transformers' with the `text_model.` level.
ComfyUI writes those of single files, which the key map has.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from library.families.shared.targets import (
    CONV_CONTAINERS,
    LAST_NORM,
    UNET_CONTAINERS,
    UNET_ENDS,
    clip_norms,
    clip_targets,
    layers,
    lora_key,
    norms,
)
from library.families.shared.unet import map_of_config
from library.types import LoraTarget

if TYPE_CHECKING:
    from torch import nn

    from library.types import Models

PER_LEVEL, SAMPLER_PLACE = 3, 2
_WAYS = {"input_blocks": "IN", "output_blocks": "OUT"}  # of blocks' names in XTI files
FIRST_DOWN_BLOCK, MID_BLOCK, FIRST_UP_BLOCK = 1, 12, 13


def text_targets(text_encoder: nn.Module) -> list[LoraTarget]:
    """The linear layers of attention and MLP, in the model's order, then, `from_file`, the norms."""
    return clip_targets(text_encoder, "te") + clip_norms(text_encoder, "te")


def unet_targets(denoiser: nn.Module) -> list[LoraTarget]:
    """The layers of transformers and, marked `conv_only`, those of resnets and samplers.

    Then, marked `optional`, the layers at both ends and the norms, which LyCORIS adapts, and `from_file` the last norm.
    Aliases are names of single files.
    """
    containers, keys = UNET_CONTAINERS + CONV_CONTAINERS, map_of_config(denoiser.config, prefix="")

    def target(path: str, **kind: Any) -> LoraTarget:
        alias = lora_key("unet", keys.file_name(path))
        return LoraTarget(lora_key("unet", path), "denoiser", (path,), alias=alias, **kind)

    inside = [
        target(path, conv_only=container in CONV_CONTAINERS, block=block_index(path))
        for container, path in layers(denoiser, containers)
    ]
    ends = [target(path, optional=True) for path in UNET_ENDS]
    inner_norms = [target(path, optional=True, norm=True) for _, path in norms(denoiser, containers)]
    return [*inside, *ends, *inner_norms, target(LAST_NORM, optional=True, from_file=True, norm=True)]


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
