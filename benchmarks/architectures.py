"""Denoisers as they were published, and toys of the same kind, for benchmarks: built with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import nn

CLIP_TOKENS = 77
TINY_SIDE, TINY_TOKENS = 64, 8  # pixels; T5's tokens


@dataclass(frozen=True)
class Model:
    """A denoiser: its class in diffusers, the published configuration, and what changes to make a toy of it."""

    family: str
    kind: str
    config: dict[str, Any]
    tiny: dict[str, Any]
    side: int  # pixels of the square image
    # configuration, T5's tokens -> what the family's cached text consists of, without batch axis
    text: Callable[[dict[str, Any], int], dict[str, tuple[int, ...]]]
    t5_tokens: int = 0


def _sd_text(config: dict[str, Any], _: int) -> dict[str, tuple[int, ...]]:
    return {"context": (CLIP_TOKENS, config["cross_attention_dim"])}


def _sdxl_text(config: dict[str, Any], _: int) -> dict[str, tuple[int, ...]]:
    width = config["cross_attention_dim"]
    first = width * 3 // 8  # 768 of 2048
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    states = {"hidden_state1": (CLIP_TOKENS, first), "hidden_state2": (CLIP_TOKENS, width - first)}
    return {**states, "pool2": (pooled,)}


def _sd3_text(config: dict[str, Any], tokens: int) -> dict[str, tuple[int, ...]]:
    pooled = config["pooled_projection_dim"]  # both CLIPs side by side, as wide as their states
    states = {
        "lg_out": (CLIP_TOKENS, pooled),
        "lg_pooled": (pooled,),
        "t5_out": (tokens, config["joint_attention_dim"]),
    }
    masks = {"clip_l_attn_mask": (CLIP_TOKENS,), "clip_g_attn_mask": (CLIP_TOKENS,), "t5_attn_mask": (tokens,)}
    return states | masks


def _flux_text(config: dict[str, Any], tokens: int) -> dict[str, tuple[int, ...]]:
    states = {"l_pooled": (config["pooled_projection_dim"],), "t5_out": (tokens, config["joint_attention_dim"])}
    return {**states, "txt_ids": (tokens, 3), "t5_attn_mask": (tokens,)}


# Configurations as published in the repositories stable-diffusion-v1-5, stable-diffusion-xl-base-1.0,
# stable-diffusion-3.5-large, stable-diffusion-3.5-medium and FLUX.1-dev, less what the classes have by themselves.
SD15 = Model(
    "sd",
    "UNet2DConditionModel",
    {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    {
        "sample_size": 8,
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
    },
    512,
    _sd_text,
)
SDXL = Model(
    "sdxl",
    "UNet2DConditionModel",
    {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    {
        "sample_size": 8,
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1,),
        "attention_head_dim": (2,),
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 40,
    },
    1024,
    _sdxl_text,
)
SD35_LARGE = Model(
    "sd3",
    "SD3Transformer2DModel",
    {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
    {
        "sample_size": 8,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "caption_projection_dim": 32,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 8,
    },
    1024,
    _sd3_text,
    t5_tokens=256,
)
SD35_MEDIUM = replace(
    SD35_LARGE,
    config={
        **SD35_LARGE.config,
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
    },
)
FLUX_DEV = Model(
    "flux",
    "FluxTransformer2DModel",
    {"guidance_embeds": True, "joint_attention_dim": 4096, "pooled_projection_dim": 768},
    {
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
    },
    1024,
    _flux_text,
    t5_tokens=512,
)


def build_denoiser(model: Model, config: dict[str, Any], device: torch.device) -> nn.Module:
    """On `device`, in bf16, with the random weights that its class starts from."""
    usual = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return getattr(diffusers, model.kind)(**config)
    finally:
        torch.set_default_dtype(usual)
