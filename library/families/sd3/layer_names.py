"""Names of the layers of Stable Diffusion 3/3.5 in network files."""

from __future__ import annotations

import re
from functools import cache

from library.checkpoints.layer_names import PartNames
from library.families.sd3.keymap import mmdit_map
from library.families.shared.layer_names import LayerSizes, clip_names, t5_names

WIDTH_PER_BLOCK = 64  # a model of so many blocks is so many times 64 wide
_BLOCK = re.compile(r"lora_unet_(?:joint|transformer)_blocks_(\d+)_")
_OF_MODEL_WIDTH = re.compile(r"lora_unet_\w+_(attn_(qkv|to_q|to_k|to_v|add_q_proj)|adaLN_modulation_1|norm1_linear)")


def layer_names(sizes: LayerSizes) -> tuple[PartNames, ...]:
    """The parts of a model that a file with layers of these sizes is of.

    What the last block has differs from the others, and a file need not have layers of it: the width says the depth.
    """
    numbers = [int(match[1]) for name in sizes if (match := _BLOCK.match(name))]
    widths = [width for name, (_, width) in sizes.items() if _OF_MODEL_WIDTH.fullmatch(name)]
    depth = max(numbers, default=0) + 1
    if widths and widths[0] % WIDTH_PER_BLOCK == 0:
        depth = max(depth, widths[0] // WIDTH_PER_BLOCK)
    return (
        _denoiser(depth),
        clip_names("te1", "te", diffusers="text_encoder", comfyui="clip_l"),
        clip_names("te2", diffusers="text_encoder_2", comfyui="clip_g"),
        t5_names("te3", diffusers="text_encoder_3"),
    )


@cache
def _denoiser(depth: int) -> PartNames:
    keys = mmdit_map(depth, prefix="")
    return PartNames(keys=keys, prefixes=("lora_unet",), diffusers="transformer", comfyui="diffusion_model")
