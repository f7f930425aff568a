"""Statistics of the noise kinds, each against what its definition says, with fixed seeds."""

from __future__ import annotations

import torch
from torch.nn import functional

from library.objectives import noise


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ZEROS = torch.zeros(64, 4, 16, 16)


def test_standard_normal_is_standard_and_repeats_with_the_seed():
    drawn = noise.standard_normal(ZEROS, rng())
    assert abs(drawn.mean().item()) < 0.02  # 65536 numbers: 5 deviations of the mean
    assert abs(drawn.std().item() - 1) < 0.02
    assert torch.equal(drawn, noise.standard_normal(ZEROS, rng()))
    assert not torch.equal(drawn, noise.standard_normal(ZEROS, rng(1)))


def test_offset_adds_one_number_per_item_and_channel():
    added = noise.offset_noise(ZEROS, ZEROS, rng(), strength=0.5)
    assert torch.equal(added, added[:, :, :1, :1].expand_as(added))
    assert abs(added[:, :, 0, 0].std().item() - 0.5) < 0.1  # 256 numbers: 4.5 deviations of the estimate
    assert added[:, :, 0, 0].unique().numel() == 256


def test_offset_random_strength_is_uniform_up_to_the_given_one():
    strengths = []
    generator = rng()
    for _ in range(400):
        strengths.append(noise.offset_noise(ZEROS[:, :, :1, :1], ZEROS, generator, strength=0.5, random_strength=True))
    spread = torch.stack([s.std() for s in strengths])
    assert abs(spread.mean().item() - 0.25) < 0.03  # mean of U(0, 0.5)
    assert spread.max() < 0.5 * 1.2
    assert spread.min() < 0.02
    assert abs((spread < 0.125).float().mean().item() - 0.25) < 0.1


def test_adaptive_scale_adds_to_the_strength_by_channel_mean_and_never_goes_below_zero():
    latents = torch.zeros(4096, 2, 2, 2)
    latents[:, 0] = torch.tensor([[-6.0, 0.0], [-4.0, -2.0]])  # the size of the mean, -3, counts and not its sign
    grown = noise.offset_noise(torch.zeros_like(latents), latents, rng(), strength=0.1, adaptive_scale=0.2)
    assert abs(grown[:, 0].std().item() - (0.1 + 0.2 * 3)) < 0.04
    assert abs(grown[:, 1].std().item() - 0.1) < 0.006
    shrunk = noise.offset_noise(torch.zeros_like(latents), latents, rng(), strength=0.1, adaptive_scale=-0.2)
    assert shrunk[:, 0].abs().max() == 0
    assert abs(shrunk[:, 1].std().item() - 0.1) < 0.006


def plain_multires(start: torch.Tensor, generator: torch.Generator, iterations: int, discount: float) -> torch.Tensor:
    """Written from the definition; shares only the source of random numbers."""
    total, host = start.double(), noise.host_random(generator)
    height, width = start.shape[-2:]
    for i in range(iterations):
        q = 2 + 2 * host.random()
        h, w = max(1, int(height // q**i)), max(1, int(width // q**i))
        layer = torch.randn(*start.shape[:2], h, w, generator=generator).double()
        total = total + discount**i * functional.interpolate(layer, size=(height, width), mode="bilinear")
        if h == 1 or w == 1:
            break
    variance = ((total - total.mean()) ** 2).sum() / (total.numel() - 1)
    return total / variance.sqrt()


def test_multires_matches_its_definition():
    start = torch.randn(2, 4, 40, 24, generator=rng(5))
    ours = noise.multires_noise(start, rng(7), iterations=6, discount=0.4)
    torch.testing.assert_close(ours.double(), plain_multires(start, rng(7), 6, 0.4), rtol=0, atol=2e-6)  # float32


def test_multires_has_unit_deviation_and_more_low_frequencies():
    start = torch.randn(16, 4, 64, 64, generator=rng(5))
    ours = noise.multires_noise(start, rng(7), iterations=8, discount=0.8)
    assert abs(ours.std().item() - 1) < 1e-5

    def coarse_power(x):  # white noise has 1/256 here
        return functional.avg_pool2d(x, 16).var().item()

    assert coarse_power(start) < 2 / 256
    assert coarse_power(ours) > 10 / 256


def test_multires_with_one_iteration_is_two_layers_of_white_noise():
    start = torch.zeros(2, 4, 8, 8)
    generator = rng(7)
    white = torch.randn(2, 4, 8, 8, generator=generator)
    ours = noise.multires_noise(start, rng(7), iterations=1, discount=0.3)
    torch.testing.assert_close(ours, white / white.std())


def test_perturbed_noise_has_the_sum_of_variances():
    start = noise.standard_normal(ZEROS, rng(1))
    perturbed = noise.perturbed_noise(start, rng(2), gamma=0.5)
    assert abs((perturbed - start).std().item() - 0.5) < 0.01
    assert abs(perturbed.var().item() - 1.25) < 0.03


def test_perturbed_noise_random_strength_is_uniform_up_to_gamma():
    generator, start = rng(3), torch.zeros(8, 4, 8, 8)
    strengths = torch.stack(
        [noise.perturbed_noise(start, generator, gamma=0.4, random_strength=True).std() for _ in range(400)]
    )
    assert abs(strengths.mean().item() - 0.2) < 0.02  # 3.5 deviations of the mean of 400 U(0, 0.4)
    assert strengths.max() < 0.4 * 1.06
    assert strengths.min() < 0.02


def test_random_strengths_come_from_the_generator():
    for draw in (
        lambda generator: noise.offset_noise(ZEROS, ZEROS, generator, strength=0.5, random_strength=True),
        lambda generator: noise.perturbed_noise(ZEROS, generator, gamma=0.5, random_strength=True),
    ):
        assert torch.equal(draw(rng(4)), draw(rng(4)))


def test_host_random_follows_the_state_and_leaves_it():
    generator = rng(9)
    before = generator.get_state()
    first = noise.host_random(generator).random()
    assert torch.equal(before, generator.get_state())
    assert noise.host_random(generator).random() == first
    torch.randn(1, generator=generator)
    assert noise.host_random(generator).random() != first
