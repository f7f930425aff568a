"""Layers of Stable Diffusion 3 and 3.5. No torch here."""

from __future__ import annotations

from typing import ClassVar

from networks.selections.dit import BlockStack, DitSelection

_JOINT = r"^lora_unet_joint_\D*(\d+)_"


class Sd3Selection(DitSelection):
    """Layers of Stable Diffusion 3 and 3.5: the transformer's, CLIP-L's, CLIP-G's and, where asked for, T5's."""

    STACKS: ClassVar = {"joint": BlockStack("train_block_indices", _JOINT)}
    TYPES: ClassVar = {
        "context_attn_dim": _JOINT + "context_block_attn",
        "context_mlp_dim": _JOINT + "context_block_mlp_",
        "context_mod_dim": _JOINT + "context_block_adaLN_",
        "x_attn_dim": _JOINT + "x_block_attn",  # attn2 too
        "x_mlp_dim": _JOINT + "x_block_mlp_",
        "x_mod_dim": _JOINT + "x_block_adaLN_",
    }
    EXTRA: ClassVar = "emb_dims"
    EXTRA_LAYERS: ClassVar = (
        r"^lora_unet_context_embedder$",
        r"^lora_unet_t_embedder_",
        r"^lora_unet_x_embedder_",
        r"^lora_unet_y_embedder_",
        r"^lora_unet_final_layer_adaLN_",
        r"^lora_unet_final_layer_linear$",
    )
