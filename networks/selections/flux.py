"""Layers of FLUX.1. No torch here."""

from __future__ import annotations

from typing import ClassVar

from networks.selections.dit import BlockStack, DitSelection

_DOUBLE, _SINGLE = r"^lora_unet_double_\D*(\d+)_", r"^lora_unet_single_\D*(\d+)_"


class FluxSelection(DitSelection):
    """Layers of FLUX.1: the transformer's, CLIP-L's and, where they are asked for, T5's."""

    STACKS: ClassVar = {
        "double": BlockStack("train_double_block_indices", _DOUBLE),
        "single": BlockStack("train_single_block_indices", _SINGLE),
    }
    TYPES: ClassVar = {
        "img_attn_dim": _DOUBLE + "img_attn_",
        "txt_attn_dim": _DOUBLE + "txt_attn_",
        "img_mlp_dim": _DOUBLE + "img_mlp_",
        "txt_mlp_dim": _DOUBLE + "txt_mlp_",
        "img_mod_dim": _DOUBLE + "img_mod_",
        "txt_mod_dim": _DOUBLE + "txt_mod_",
        "single_dim": _SINGLE + "linear",
        "single_mod_dim": _SINGLE + "modulation_",
    }
    EXTRA: ClassVar = "in_dims"
    EXTRA_LAYERS: ClassVar = (
        r"^lora_unet_img_in$",
        r"^lora_unet_time_in_",
        r"^lora_unet_vector_in_",
        r"^lora_unet_guidance_in_",
        r"^lora_unet_txt_in$",
    )
