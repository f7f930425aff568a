"""A Stable Diffusion shaped model a few thousand parameters small, and LoRA targets found by walking it."""

from __future__ import annotations

import re

import pytest
import torch

from library.types import LoraTarget, Models


def tiny_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def tiny_text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=100,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def _block(path: str) -> int:
    """The block index of SD 1.x as formats describe it."""
    if path.startswith("mid"):
        return 12
    side, i, kind, j = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)", path).groups()
    k = 3 * int(i) + (2 if kind.endswith("samplers") else int(j))
    return (1 if side == "down" else 13) + k


def walk(models: Models) -> list[LoraTarget]:
    """Every linear layer and convolution inside the containers that SD LoRA adapts."""
    targets = []
    encoder = models.text_encoders["te"]
    for path, module in encoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            public = path if path.startswith("text_model.") else f"text_model.{path}"
            targets.append(LoraTarget("lora_te_" + public.replace(".", "_"), "te", (path,)))
    for path, module in models.denoiser.named_modules():
        if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) or not re.match(r"(down|mid|up)_block", path):
            continue
        attention = ".attentions." in path
        key = "lora_unet_" + path.replace(".", "_")
        targets.append(LoraTarget(key, "denoiser", (path,), conv_only=not attention, block=_block(path)))
    return targets


@pytest.fixture
def models() -> Models:
    torch.manual_seed(0)
    unet, encoder = tiny_unet(), tiny_text_encoder()
    models = Models(unet.eval(), {"te": encoder.eval()}, {}, None)
    for part in (unet, encoder):
        part.requires_grad_(False)
    return models


@pytest.fixture
def targets(models) -> list[LoraTarget]:
    return walk(models)


@pytest.fixture
def find_targets():
    return walk


@pytest.fixture
def randomise():
    """Gives a network's up matrices values, so that it changes outputs."""

    def fill(network, seed=1):
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "lora_up" in name:
                    parameter.normal_(0, 0.3, generator=rng)
        return network

    return fill


def unet_output(unet):
    rng = torch.Generator().manual_seed(5)
    noisy = torch.randn(2, 4, 8, 8, generator=rng)
    text = torch.randn(2, 7, 16, generator=rng)
    return unet(noisy, torch.tensor([3, 700]), text).sample


def text_output(encoder):
    return encoder(torch.tensor([[0, 5, 7, 9, 1, 1], [0, 8, 3, 4, 2, 1]])).last_hidden_state


@pytest.fixture
def outputs():
    """(U-Net output, text encoder output) for fixed inputs."""

    def run(models):
        with torch.no_grad():
            return unet_output(models.denoiser), text_output(models.text_encoders["te"])

    return run
