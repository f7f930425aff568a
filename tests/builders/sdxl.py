"""A tiny SDXL model with random weights, written in the layouts of real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.families.sdxl.loading import Source
from library.families.sdxl.saving import save_model
from library.families.sdxl.tokenizers import sdxl_tokenizers
from library.options.base import Options
from library.types import Models
from tests.builders.options import options_for
from tests.builders.written import written_once

WIDTH1, WIDTH2, POOLED = 64, 128, 64  # of the text encoders; the projection is not square, unlike the real one


def tiny_sdxl(seed: int = 0, channels: tuple[int, int, int] = (64, 64, 128)) -> Models:
    """A whole SDXL model of about 20 million numbers, ten of them vocabularies. Latents are 1/8.

    `channels`: of the U-Net's three levels, multiples of 64.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=channels,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=(1, 1, 2),
            cross_attention_dim=WIDTH1 + WIDTH2,
            attention_head_dim=tuple(width // 64 for width in channels),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=POOLED + 6 * 256,
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            scaling_factor=0.13025,
        )
        text_encoders = {
            "te1": CLIPTextModel(_text_config(WIDTH1, "quick_gelu", 49407)),
            "te2": CLIPTextModelWithProjection(_text_config(WIDTH2, "gelu", 0)),
        }
        models = (unet, vae, *text_encoders.values())
        # Fresh biases and norms are all zeros and ones, so that mixed-up names would not show.
        for model in models:
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data += 0.02 * torch.randn_like(parameter)
    for model in models:
        model.requires_grad_(False).eval()
    source = Source(name="", vae_name="", is_file=False)
    return Models(unet, text_encoders, sdxl_tokenizers(), vae, source)


def _text_config(width: int, hidden_act: str, pad_id: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=POOLED,
        num_hidden_layers=3,
        num_attention_heads=width // 64,
        hidden_act=hidden_act,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=pad_id,
    )


@written_once
def write_tiny_sdxl(path: str | Path, seed: int = 0, dtype: torch.dtype | None = None, **sizes: Any) -> Path:
    """Writes a tiny model: .safetensors, .ckpt, or a Diffusers folder when there is no such ending."""
    path = Path(path)
    save_as = {".safetensors": "safetensors", ".ckpt": "ckpt"}.get(path.suffix, "diffusers_safetensors")
    save_model(tiny_sdxl(seed, **sizes), path, save_as=save_as, dtype=dtype, metadata={})
    return path


def sdxl_options(model: str | Path, **values: Any) -> Options:
    """All options of the family's network script, with their defaults but for `values`."""
    return options_for("sdxl", "network", pretrained_model_name_or_path=str(model), **values)
