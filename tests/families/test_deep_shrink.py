"""Deep Shrink against a U-Net that is gone through block by block, as the feature's own description does it."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import interpolate

from library.errors import UserError
from library.families.sd.adapter import SdFamily
from library.families.shared.deep_shrink import shrinking
from library.families.shared.unet import unet_stages
from tests.builders import sd_options, tiny_sd
from tests.builders.sdxl import tiny_sdxl

CLOSE = 1e-5  # the same operations, in float32


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return tiny_sd().denoiser


def inputs(height: int, width: int, context: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    noisy, states = (torch.randn(shape, generator=generator) for shape in ((2, 4, height, width), (2, 77, context)))
    return noisy, torch.tensor([700, 700]), states


def by_blocks(
    unet: UNet2DConditionModel, noisy: Tensor, timesteps: Tensor, states: Tensor, depth: int | None, ratio: float = 0.5
) -> Tensor:
    """What the U-Net gives, with its features made smaller before the input block `depth`."""

    def run(modules: list[nn.Module], features: Tensor) -> Tensor:
        for module in modules:
            name = type(module).__name__
            if "Resnet" in name:
                features = module(features, time)
            elif "Transformer" in name:
                features = module(features, encoder_hidden_states=states, return_dict=False)[0]
            else:
                features = module(features)
        return features

    def like(features: Tensor, other: Tensor) -> Tensor:
        return interpolate(features, size=other.shape[-2:], mode="bicubic", align_corners=False)

    time = unet.time_embedding(unet.time_proj(timesteps))
    middle, features, skips = unet.mid_block, noisy, []
    down, up = unet_stages(unet)
    for number, modules in enumerate(down):
        if number == depth:
            features = interpolate(features, scale_factor=ratio, mode="bicubic", align_corners=False)
        features = run(modules, features)
        skips.append(features)
    features = run([middle.resnets[0], middle.attentions[0], middle.resnets[1]], features)
    for modules in up:
        skip = skips.pop()
        if features.shape[-2:] != skip.shape[-2:]:
            features = like(features, skip)
        features = run(modules, torch.cat([features, skip], dim=1))
    if features.shape[-2:] != noisy.shape[-2:]:
        features = like(features, noisy)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(features)))


@torch.no_grad()
@pytest.mark.parametrize(("depth", "size"), [*((depth, (8, 8)) for depth in (None, *range(7))), (3, (16, 24))])
def test_every_depth(unet, depth, size):
    noisy, timesteps, states = inputs(*size)
    with shrinking([unet], 0.5) as set_depth:
        set_depth(depth)
        found = unet(noisy, timesteps, states).sample
    assert found.shape == noisy.shape
    assert (found - by_blocks(unet, noisy, timesteps, states, depth)).abs().max() < CLOSE
    plain = unet(noisy, timesteps, states).sample
    assert ((found - plain).abs().max() < 1e-6) == (depth is None)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.75, 0.3])
def test_other_ratios_and_sizes_that_do_not_divide(unet, ratio):
    noisy, timesteps, states = inputs(19, 30)
    with shrinking([unet], ratio) as set_depth:
        set_depth(3)
        found = unet(noisy, timesteps, states).sample
    assert (found - by_blocks(unet, noisy, timesteps, states, 3, ratio)).abs().max() < CLOSE


@torch.no_grad()
def test_a_ratio_of_one_changes_nothing(unet):
    noisy, timesteps, states = inputs(16, 16)
    with shrinking([unet], 1.0) as set_depth:
        set_depth(2)
        found = unet(noisy, timesteps, states).sample
    assert (found - unet(noisy, timesteps, states).sample).abs().max() < CLOSE


@torch.no_grad()
def test_features_that_cannot_become_smaller_stay_as_they_are(unet):
    noisy, timesteps, states = inputs(8, 8)
    with shrinking([unet], 0.5) as set_depth:
        set_depth(7)  # where they are 1 x 1
        found = unet(noisy, timesteps, states).sample
    assert torch.equal(found, unet(noisy, timesteps, states).sample)


@torch.no_grad()
def test_sdxl():
    models = tiny_sdxl()
    unet, generator = models.denoiser, torch.Generator().manual_seed(1)
    noisy = torch.randn(1, 4, 8, 8, generator=generator)
    states = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    added = {"text_embeds": torch.zeros(1, width), "time_ids": torch.zeros(1, 6)}
    given = {"encoder_hidden_states": states, "added_cond_kwargs": added}
    plain = unet(noisy, 700, **given).sample
    assert len(unet_stages(unet)[0]) == len(unet_stages(unet)[1])
    for depth in (0, 3, 8):
        with shrinking([unet], 0.5) as set_depth:
            set_depth(depth)
            found = unet(noisy, 700, **given).sample
        assert found.shape == noisy.shape
        assert (found - plain).abs().max() > 1e-5, depth


@torch.no_grad()
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_control_net_becomes_smaller_with_its_u_net(unet, depth):
    """Its residuals have the sizes of the U-Net's features, or they could not be added."""
    net = ControlNetModel.from_unet(unet).eval()
    for name, weight in net.named_parameters():
        if name.startswith("controlnet_"):
            weight.data = 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    noisy, timesteps, states = inputs(8, 16)
    image = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(3))
    found = []
    with shrinking([unet, net], 0.5) as set_depth:
        for now in (depth, None):
            set_depth(now)
            steered = net(noisy, timesteps, states, controlnet_cond=image, return_dict=False)
            added = {"down_block_additional_residuals": steered[0], "mid_block_additional_residual": steered[1]}
            found += [unet(noisy, timesteps, states, **added).sample, unet(noisy, timesteps, states).sample]
    assert all(one.shape == noisy.shape for one in found)
    assert (found[0] - found[1]).abs().max() > 1e-3  # the ControlNet acts
    assert (found[0] - found[2]).abs().max() > 1e-3  # and so does Deep Shrink
    plain = net(noisy, timesteps, states, controlnet_cond=image, return_dict=False)
    assert torch.equal(plain[1], steered[1])


def test_no_hook_is_left(unet):
    net = ControlNetModel.from_unet(unet)

    def fails() -> None:
        with shrinking([unet, net], 0.5):
            assert any(module._forward_hooks for module in unet.modules())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert not any(m._forward_hooks or m._forward_pre_hooks for part in (unet, net) for m in part.modules())


def test_a_block_that_is_not_there_is_said(unet):
    with (
        pytest.raises(UserError, match="has the input blocks 0 to 7, and none 11"),
        SdFamily(sd_options("")).shrinking([unet], 0.5) as set_depth,
    ):
        set_depth(11)
