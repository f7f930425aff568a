"""A tiny random model of real diffusers and transformers classes, and a plain family around it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from library.families.base import Family
from library.types import FamilyTraits, Models, TextCond

WIDTH, POSITIONS, VOCABULARY = 16, 24, 128
TRAITS = FamilyTraits(
    label="the test family",
    text_encoders=("te",),
    latent_channels=4,
    pixel_multiple=8,
    bucket_step=64,
    objective="ddpm",
    cache_suffix="_test.npz",
    default_resolution=512,
    sample_steps=30,
    sample_scale=7.5,
)


def tiny_models() -> Models:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
        dropout=0.5,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=POSITIONS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    for module in (unet, vae, text):
        module.requires_grad_(False).eval()
    return Models(denoiser=unet, text_encoders={"te": text}, tokenizers={}, vae=vae)


class TinyFamily(Family):
    """One character is one token. `padded=False` makes each call as long as its longest caption."""

    traits = TRAITS

    def __init__(self, prediction: str = "epsilon", padded: bool = True):
        unused = SimpleNamespace()
        super().__init__(
            unused,
            loader=unused,
            latents=SimpleNamespace(decode=self.decode_latents),
            text=SimpleNamespace(encode=self.encode_text),
            denoiser=SimpleNamespace(
                predict=self.predict, prediction_type=lambda: prediction, control_channels=lambda models: 0
            ),
            targets=unused,
            writer=unused,
        )
        self.padded, self.calls = padded, []

    def encode_text(self, models, captions, *, emphasis=None):
        rows = [[0, *(2 + ord(c) % (VOCABULARY - 2) for c in text[: POSITIONS - 2]), 1] for text in captions]
        length = POSITIONS if self.padded else max(map(len, rows))
        ids = torch.tensor([row + [1] * (length - len(row)) for row in rows])
        return TextCond({"states": models.text_encoders["te"](ids).last_hidden_state})

    def predict(self, models, noisy, timesteps, cond, batch=None):
        self.calls.append((len(noisy), cond.tensors["states"].shape[1], batch.target_sizes.tolist()))
        return models.denoiser(noisy, timesteps, cond.tensors["states"]).sample

    def decode_latents(self, models, latents):
        return models.vae.decode(latents / 0.18215).sample


@pytest.fixture
def models() -> Models:
    return tiny_models()


@pytest.fixture
def make_family():
    return TinyFamily


@pytest.fixture
def traits() -> FamilyTraits:
    return TRAITS
