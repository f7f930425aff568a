"""Low-rank algebra against numpy's full SVD in float64. Tolerances are for float32, relative to the largest value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from library.model_tools import low_rank


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _product(svd: low_rank.Svd) -> np.ndarray:
    return (svd.u.double() * svd.s.double() @ svd.vh.double()).numpy()


@pytest.mark.parametrize(
    ("out", "rank", "width"),
    [(40, 6, 30), (30, 6, 40), (5, 8, 40), (40, 8, 5), (6, 6, 6), (7, 1, 9)],
    ids=["tall", "wide", "rank above out", "rank above in", "square", "rank 1"],
)
def test_svd_of_a_product_is_numpys_of_the_whole_matrix(out: int, rank: int, width: int):
    up, down = _random(out, rank), _random(rank, width, seed=1)
    whole = (up.double() @ down.double()).numpy()
    found = low_rank.svd_of_product(up, down)
    expected = np.linalg.svd(whole, compute_uv=False)
    count = min(out, rank, width)
    assert len(found.s) == count
    np.testing.assert_allclose(found.s, expected[:count], atol=1e-5 * expected[0])
    np.testing.assert_allclose(_product(found), whole, atol=1e-5 * expected[0])
    for basis in (found.u.T, found.vh):
        np.testing.assert_allclose(basis @ basis.T, np.eye(count), atol=1e-5)


def test_svd_of_a_sum_is_numpys_of_the_summed_matrices():
    products = [(_random(20, rank, seed=rank), _random(rank, 25, seed=9 - rank)) for rank in (2, 5, 1)]
    whole = sum((up.double() @ down.double()).numpy() for up, down in products)
    found = low_rank.svd_of_sum(products)
    assert len(found.s) == 8
    np.testing.assert_allclose(_product(found), whole, atol=1e-5 * np.abs(whole).max())


def test_factors_are_the_best_approximation_with_the_singular_values_in_up():
    up, down = _random(20, 6), _random(6, 30, seed=1)
    whole = (up.double() @ down.double()).numpy()
    u, s, vh = np.linalg.svd(whole)
    found = low_rank.svd_of_product(up, down)
    ours_up, ours_down = found.factors(3)
    np.testing.assert_allclose(ours_up @ ours_down, u[:, :3] * s[:3] @ vh[:3], atol=1e-5 * s[0])
    np.testing.assert_allclose(ours_up.norm(dim=0), s[:3], rtol=1e-5)
    np.testing.assert_allclose(ours_down.norm(dim=1), np.ones(3), rtol=1e-5)
    assert found.kept(3) == pytest.approx((s[:3] ** 2).sum() / (s**2).sum(), abs=1e-6)


def test_ranks_that_there_are_not_come_as_zeros():
    found = low_rank.svd_of_product(_random(20, 2), _random(2, 30, seed=1))
    up, down = found.factors(5)
    assert (up.shape, down.shape) == ((20, 5), (5, 30))
    assert not up[:, 2:].any()
    assert not down[2:].any()
    assert found.kept(2) == found.kept(5) == 1


def _noisy_low_rank(rank: int, noise: float) -> torch.Tensor:
    return _random(150, rank) @ _random(rank, 120, seed=1) + noise * _random(150, 120, seed=2)


@pytest.mark.parametrize("rank", [1, 4, 8, 30, 60, 200])
def test_a_randomised_svd_captures_what_the_exact_one_does(rank: int):
    matrix = _noisy_low_rank(8, 0.5)
    exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    found = low_rank.truncated_svd(matrix, rank)
    assert len(found.s) == min(rank, 120)
    best = (exact[:rank] ** 2).sum() / (exact**2).sum()
    assert low_rank.captured(matrix, found) == pytest.approx(best, rel=low_rank.TOLERANCE)
    residual = np.linalg.norm(matrix.numpy() - _product(found)) ** 2 / np.linalg.norm(matrix.numpy()) ** 2
    assert low_rank.captured(matrix, found) == pytest.approx(1 - residual, abs=1e-5)


@pytest.mark.parametrize("shape", [(300, 300), (200, 600), (600, 200)])
@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_the_captured_energy_is_within_the_tolerance_of_the_best(shape: tuple[int, int], rank: int, decay: float):
    """Noise, whose singular values hardly fall, is the hardest case."""
    matrix = _random(*shape) * torch.arange(1, shape[1] + 1).float() ** -decay
    exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    best = (exact[:rank] ** 2).sum() / (exact**2).sum()
    found = low_rank.captured(matrix, low_rank.truncated_svd(matrix, rank))
    assert best * (1 - low_rank.TOLERANCE) <= found <= best * (1 + 1e-5)


def test_ranks_beyond_that_of_the_matrix_are_empty():
    matrix = _random(200, 3) @ _random(3, 150, seed=1)
    found = low_rank.truncated_svd(matrix, 10)
    assert torch.count_nonzero(found.s > 1e-4 * found.s[0]) == 3
    up, down = found.factors(10)
    torch.testing.assert_close(up @ down, matrix, rtol=1e-4, atol=1e-4)


def test_a_randomised_svd_is_the_same_every_time_and_leaves_the_global_stream_alone():
    matrix = _noisy_low_rank(8, 0.5)
    state = torch.get_rng_state()
    first, second = low_rank.truncated_svd(matrix, 4), low_rank.truncated_svd(matrix, 4)
    assert torch.equal(first.u, second.u)
    assert torch.equal(torch.get_rng_state(), state)
    other = low_rank.truncated_svd(matrix, 4, generator=torch.Generator().manual_seed(7))
    assert not torch.equal(first.u, other.u)


def test_nothing_stays_nothing():
    zero = torch.zeros(20, 30)
    svd = low_rank.svd_of_product(torch.zeros(20, 4), torch.zeros(4, 30))
    assert svd.kept(1) == 1
    assert low_rank.captured(zero, low_rank.truncated_svd(zero, 2)) == 1
    up, down = low_rank.clamped(*svd.factors(2), 0.99)
    assert not (up @ down).any()


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99, 1.0])
def test_clamping_cuts_at_numpys_quantile_of_all_values(quantile: float):
    up, down = _random(20, 6) * 3, _random(6, 30, seed=1)
    limit = abs(np.quantile(np.concatenate([up.numpy().ravel(), down.numpy().ravel()]), quantile))
    for ours, whole in zip(low_rank.clamped(up, down, quantile), (up, down), strict=True):
        np.testing.assert_allclose(ours, np.clip(whole.numpy(), -limit, limit), atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 1, 1), (8, 6, 3, 3)])
def test_kernels_are_flattened_and_restored(shape: tuple[int, ...]):
    down, up = _random(4, *shape[1:]).half(), _random(8, 4, *[1] * (len(shape) - 2))
    flat_up, flat_down = low_rank.flattened(up, down)
    assert (flat_up.shape, flat_down.shape) == ((8, 4), (4, down[0].numel()))
    assert flat_down.dtype == torch.float32
    again_up, again_down = low_rank.restored(flat_up, flat_down, shape)
    assert torch.equal(again_up, up)
    assert torch.equal(again_down, down.float())


def test_a_3x3_product_is_the_convolution_that_the_matrices_are():
    up, down, x = _random(8, 4, 1, 1), _random(4, 6, 3, 3, seed=1), _random(2, 6, 9, 9, seed=2)
    hidden = torch.nn.functional.conv2d(x, down, padding=1)
    expected = torch.nn.functional.conv2d(hidden, up)
    svd = low_rank.svd_of_product(*low_rank.flattened(up, down))
    new_up, new_down = low_rank.restored(*svd.factors(4), (8, 6, 3, 3))
    ours = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, new_down, padding=1), new_up)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
