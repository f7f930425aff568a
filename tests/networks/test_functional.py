"""References: a convolution carried out in two steps, and norms of the product formed in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from networks.types import functional


def test_linear_delta_is_the_matrix_product():
    down, up = torch.randn(3, 5), torch.randn(4, 3)
    torch.testing.assert_close(functional.delta(down, up), up @ down)


@pytest.mark.parametrize("kernel", [1, 3])
def test_conv_delta_acts_like_down_then_up(kernel):
    rng = torch.Generator().manual_seed(0)
    down = torch.randn(3, 5, kernel, kernel, generator=rng, dtype=torch.float64)
    up = torch.randn(4, 3, 1, 1, generator=rng, dtype=torch.float64)
    x = torch.randn(2, 5, 9, 9, generator=rng, dtype=torch.float64)
    two_steps = F.conv2d(F.conv2d(x, down, stride=2, padding=kernel // 2), up)
    one_step = F.conv2d(x, functional.delta(down, up), stride=2, padding=kernel // 2)
    torch.testing.assert_close(one_step, two_steps, rtol=1e-12, atol=1e-12)  # float64, sums of 45 terms


@pytest.mark.parametrize("shapes", [((3, 40), (50, 3)), ((3, 5, 3, 3), (4, 3, 1, 1))])
def test_delta_norm(shapes):
    down, up = (torch.randn(shape) for shape in shapes)
    expected = torch.linalg.norm(functional.delta(down.double(), up.double()))
    torch.testing.assert_close(functional.delta_norm(down, up).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("size", "limited"), [(10.0, True), (0.01, False)])
def test_max_norm_factor_brings_the_norm_to_the_limit(size, limited):
    down, up, scale, limit = torch.randn(4, 16) * size, torch.randn(8, 4), 0.25, 1.5
    before = scale * torch.linalg.norm(up @ down)
    factor = functional.max_norm_factor(down, up, scale, limit)
    after = scale * torch.linalg.norm((up * factor) @ (down * factor))
    assert (before > limit) == limited
    torch.testing.assert_close(after, torch.tensor(limit) if limited else before, rtol=1e-5, atol=0)


def test_max_norm_of_a_fresh_layer_is_no_division_by_zero():
    assert functional.max_norm_factor(torch.randn(4, 16), torch.zeros(8, 4), 1.0, 1.0) == 1


@pytest.mark.parametrize(("alpha", "expected"), [(None, 8.0), (0, 8.0), (0.0, 8.0), (2, 2.0), (0.5, 0.5)])
def test_effective_alpha(alpha, expected):
    assert functional.effective_alpha(alpha, 8) == expected


def test_fit_kernel_reads_both_forms_of_a_1x1_layer():
    matrix = torch.randn(4, 6)
    assert functional.fit_kernel(matrix, torch.zeros(4, 6, 1, 1)).shape == (4, 6, 1, 1)
    assert torch.equal(functional.fit_kernel(matrix[:, :, None, None], torch.zeros(4, 6)), matrix)
    with pytest.raises(ValueError, match=r"\(4, 6\) does not fit \(4, 6, 3, 3\)"):
        functional.fit_kernel(matrix, torch.zeros(4, 6, 3, 3))
    with pytest.raises(ValueError, match="does not fit"):
        functional.fit_kernel(matrix, torch.zeros(6, 4))
