"""References: a convolution carried out in two steps, and norms of the product formed in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from networks.layers import functional


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


def test_delta_norm_of_small_matrices_of_few_bits():
    down, up = (torch.randn(shape).mul(1e-2).bfloat16() for shape in ((3, 40), (50, 3)))
    expected = torch.linalg.norm(functional.delta(down.double(), up.double())).float()
    assert expected < 0.1
    torch.testing.assert_close(functional.delta_norm(down, up), expected, rtol=1e-5, atol=0)


def test_delta_norm_of_ranks_that_cancel_is_0():
    """Rounding may leave the square of the norm just below it."""
    for seed in range(50):
        rng = torch.Generator().manual_seed(seed)
        column, row = torch.randn(9, 1, generator=rng), torch.randn(1, 7, generator=rng)
        norm = functional.delta_norm(torch.cat([3 * row, -row]), torch.cat([column, 3 * column], dim=1))
        assert 0 <= norm < 0.02 * column.norm() * row.norm()


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


def test_kronecker_of_matrices_and_of_kernels_in_any_layout():
    first, second = torch.randn(2, 3), torch.randn(5, 4)
    assert torch.equal(functional.kronecker(first, second.T), torch.kron(first, second.T.contiguous()))
    kernels = torch.randn(4, 5, 3, 3).to(memory_format=torch.channels_last)
    expected = torch.stack([torch.kron(first, kernels[..., i, j]) for i in range(3) for j in range(3)], dim=-1)
    assert torch.equal(functional.kronecker(first, kernels), expected.reshape(8, 15, 3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cayley_rotates_by_twice_the_arc_tangent(dtype):
    """In the plane (I + Q) (I - Q)^-1 turns by 2 atan q: cos = (1 - q^2) / (1 + q^2), sin = 2 q / (1 + q^2)."""
    q = torch.tensor([0.0, 0.5, -2.0], dtype=dtype)
    zero = torch.zeros_like(q)
    turned = functional.cayley(torch.stack([zero, q, -q, zero], -1).reshape(3, 2, 2))
    cosine, sine = (1 - q**2) / (1 + q**2), 2 * q / (1 + q**2)
    expected = torch.stack([cosine, sine, -sine, cosine], -1).reshape(3, 2, 2)
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-6)
