from __future__ import annotations

import pytest
import torch

from library.objectives.masks import mask_loss


def test_every_latent_position_takes_the_mean_of_its_area():
    mask = torch.rand(2, 1, 32, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = mask.reshape(2, 1, 4, 8, 3, 8).mean(dim=(3, 5))
    masked = mask_loss(torch.full((2, 5, 4, 3), 2.0), mask.float())
    torch.testing.assert_close(masked.double(), (2 * means).expand(2, 5, 4, 3), rtol=1e-6, atol=0)


def test_half_a_mask_halves_the_loss_without_renormalising():
    loss = torch.ones(1, 4, 4, 4)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    assert mask_loss(loss, mask).mean() == 0.5
    assert mask_loss(loss, mask.double()).dtype == torch.float32
    assert mask_loss(loss, torch.full_like(mask, 128 / 255)).mean().item() == pytest.approx(128 / 255)


def test_a_mask_of_ones_changes_nothing():
    loss = torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mask_loss(loss, torch.ones(2, 1, 40, 56)), loss)
