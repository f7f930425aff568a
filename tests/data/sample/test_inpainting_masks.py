"""Masks for inpainting: how large they are, of which kinds, and that they depend on size and seed alone."""

from __future__ import annotations

import numpy as np
import pytest

from library.data.sample.inpainting_masks import random_mask, wobbly_ellipse
from library.types import Size

SIZE = Size(96, 64)


@pytest.mark.parametrize("make", [random_mask, wobbly_ellipse])
def test_equal_for_equal_seeds_alone(make):
    first, again, other = make(SIZE, 5), make(SIZE, 5), make(SIZE, 6)
    assert first.shape == (64, 96)
    assert first.dtype == bool
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_areas_are_neither_nothing_nor_everything():
    areas = np.array([random_mask(SIZE, seed).mean() for seed in range(300)])
    assert 0.15 < areas.mean() < 0.3
    assert areas.max() < 0.85
    assert (areas > 0).mean() > 0.99


def test_clouds_cover_a_share_in_their_limits():
    """Without another shape beside it, a cloud is as large as its share says, from 10 to 30 percent."""
    from library.data.sample import inpainting_masks

    areas = [inpainting_masks._cloud(Size(64, 64), np.random.default_rng(seed)).mean() for seed in range(50)]
    assert 0.095 < min(areas) < max(areas) < 0.305


def test_shapes_lie_inside_with_sides_in_their_limits():
    from library.data.sample import inpainting_masks

    for seed in range(50):
        ys, xs = np.nonzero(inpainting_masks._shape(SIZE, np.random.default_rng(seed)))
        for found, side in ((np.ptp(xs) + 1, 96), (np.ptp(ys) + 1, 64)):
            assert 0.1**0.5 * side - 2 <= found <= 0.6**0.5 * side + 1


def test_the_ellipse_of_sample_images_is_a_fifth_in_the_middle():
    for seed in range(20):
        mask = wobbly_ellipse(SIZE, seed)
        ys, xs = np.nonzero(mask)
        assert mask.mean() == pytest.approx(0.2, abs=0.02)
        assert abs(xs.mean() - 47.5) < 6
        assert abs(ys.mean() - 31.5) < 4
