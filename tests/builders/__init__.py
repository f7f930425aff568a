"""Tiny models with random weights, written by the same code paths as real ones, for every test that needs a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from library.families.sd.loading import Source
from library.families.sd.saving import save_model
from library.families.sd.tokenizer import SD2_PAD
from library.options.base import Options
from library.text.tokenizers import bundled_clip_tokenizer
from library.types import Models
from tests.builders.options import options_for
from tests.builders.written import written_once

WIDTH = 64  # of a CLIP head, and so the narrowest that SD 2.x's rule for U-Net heads allows


def tiny_sd(v2: bool = False, seed: int = 0) -> Models:
    """A whole SD model of about 5 million numbers, three of them the text encoder's vocabulary. Latents are 1/8."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(WIDTH, WIDTH, WIDTH, WIDTH),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=(1, 1, 1, 1) if v2 else 8,
            use_linear_projection=v2,
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                projection_dim=WIDTH,
                num_hidden_layers=3,
                num_attention_heads=1,
                hidden_act="gelu" if v2 else "quick_gelu",
                bos_token_id=49406,
                eos_token_id=49407,
                pad_token_id=0 if v2 else 49407,
            )
        )
        # Fresh biases and norms are all zeros and ones, so that mixed-up names would not show.
        for model in (unet, vae, text_encoder):
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data += 0.02 * torch.randn_like(parameter)
    for model in (unet, vae, text_encoder):
        model.requires_grad_(False).eval()
    tokenizer = bundled_clip_tokenizer(SD2_PAD if v2 else None)
    source = Source(name="", vae_name="", v2=v2, is_file=False)
    return Models(unet, {"te": text_encoder}, {"te": tokenizer}, vae, source)


def for_inpainting(models: Models) -> Models:
    """The same model but for its U-Net's first convolution, which reads a mask and an image's latents too."""
    unet = models.denoiser
    settings = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    wide = type(unet)(**{**settings, "in_channels": 9})
    state = unet.state_dict()
    more = 0.05 * torch.randn(unet.conv_in.out_channels, 5, 3, 3, generator=torch.Generator().manual_seed(9))
    wide.load_state_dict({**state, "conv_in.weight": torch.cat([state["conv_in.weight"], more], dim=1)})
    return replace(models, denoiser=wide.requires_grad_(False).eval(), inpaints=True)


@written_once
def write_tiny_sd1(path: str | Path, seed: int = 0, dtype: torch.dtype | None = None) -> Path:
    """Writes a tiny SD 1.x model: .safetensors, .ckpt, or a Diffusers folder when there is no such ending."""
    return _write(tiny_sd(False, seed), Path(path), dtype)


@written_once
def write_tiny_sd2(path: str | Path, seed: int = 0, dtype: torch.dtype | None = None) -> Path:
    """Writes a tiny SD 2.x model, see `write_tiny_sd1`."""
    return _write(tiny_sd(True, seed), Path(path), dtype)


def sd_options(model: str | Path, **values: Any) -> Options:
    """All options of the family's network script, with their defaults but for `values`."""
    return options_for("sd", "network", pretrained_model_name_or_path=str(model), **values)


@written_once
def write_tiny_inpainting(path: str | Path, v2: bool = False) -> Path:
    """Writes a tiny model for inpainting, see `write_tiny_sd1`."""
    return _write(for_inpainting(tiny_sd(v2)), Path(path), None)


def _write(models: Models, path: Path, dtype: torch.dtype | None) -> Path:
    save_as = {".safetensors": "safetensors", ".ckpt": "ckpt"}.get(path.suffix, "diffusers_safetensors")
    save_model(models, path, save_as=save_as, dtype=dtype, metadata={})
    return path
