"""Decoding in slices against the whole decoder of diffusers, and what it takes of memory."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from library.memory.sliced_decoding import in_slices
from library.planning.watching import Watcher

CLOSE = 1e-4  # pixels are of order 1; sums are taken in another order


def vae_of(channels: tuple[int, ...]) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return vae.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return vae_of((16, 32, 32))


@pytest.mark.parametrize("slices", [2, 3, 7, 1000])
@pytest.mark.parametrize("size", [(8, 6), (13, 5)])
def test_the_image_is_the_same(vae, slices, size):
    latents = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1))
    whole = vae.decode(latents).sample
    with in_slices(vae.decoder, slices):
        found = vae.decode(latents).sample
    assert found.shape == whole.shape
    assert (found - whole).abs().max() < CLOSE
    assert not any("forward" in vars(module) for module in vae.modules())
    assert torch.equal(vae.decode(latents).sample, whole)


@pytest.mark.parametrize("slices", [None, 1])
def test_one_slice_is_the_whole(vae, slices):
    latents = torch.randn(1, 4, 8, 8)
    with in_slices(vae.decoder, slices):
        assert torch.equal(vae.decode(latents).sample, vae.decode(latents).sample)
        assert not any("forward" in vars(module) for module in vae.modules())


def test_in_bf16(vae):
    """Sums are in float32, as in torch's own norm; the rest is rounded as often, at other places."""
    import copy

    narrow = copy.deepcopy(vae).to(torch.bfloat16)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    exact, whole = vae.decode(latents).sample, narrow.decode(latents.bfloat16()).sample.float()
    with in_slices(narrow.decoder, 4):
        found = narrow.decode(latents.bfloat16()).sample.float()
    assert (found - exact).square().mean().sqrt() < 1.5 * (whole - exact).square().mean().sqrt()


def test_it_takes_less_memory():
    """By the bytes of the tensors that are alive at once: five copies of the largest features, and four in slices."""
    vae, latents = vae_of((64, 64)), torch.randn(1, 4, 64, 64)

    def most(slices: int | None) -> int:
        with Watcher() as watcher, watcher.phase("decode") as phase, in_slices(vae.decoder, slices):
            vae.decode(latents)
        return phase.peaks["cpu"].size

    assert most(32) < 0.85 * most(None)
