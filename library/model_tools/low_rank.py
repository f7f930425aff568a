"""Low-rank products ``up @ down`` and their singular values. Matrices are float32 or float64, on any device.

A product of rank r is decomposed by two thin QR decompositions and one r x r SVD, never as the matrix that it makes.
Kernels of convolutions are flattened: (out, in, k, k) is the matrix (out, in k k).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLING = 16  # directions beyond the rank that a randomised SVD looks at
TOLERANCE = 1e-3  # of the energy that it captures


class Svd(NamedTuple):
    """``u @ diag(s) @ vh``: (out, k), (k,) from the largest, (k, in)."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best product of a rank, up (out, rank) and down (rank, in): the singular values are in `up`.

        Ranks beyond those that there are come as zeros.
        """
        up, down = self.u[:, :rank] * self.s[:rank], self.vh[:rank]
        missing = rank - len(self.s)
        if missing > 0:
            up = torch.cat([up, up.new_zeros(len(up), missing)], 1)
            down = torch.cat([down, down.new_zeros(missing, down.shape[1])])
        return up, down

    def kept(self, rank: int) -> float:
        """The share of the squared Frobenius norm that the best product of a rank has: 0 to 1; 1 where all is zero."""
        energy = self.s.double().square()
        total = float(energy.sum())
        return float(energy[:rank].sum()) / total if total else 1.0


def svd_of_product(up: Tensor, down: Tensor) -> Svd:
    """The exact SVD of ``up @ down``, (out, r) and (r, in), with min(out, r, in) singular values."""
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return Svd(left @ u, s, vh @ right.T)


def svd_of_sum(products: Sequence[tuple[Tensor, Tensor]]) -> Svd:
    """The exact SVD of a sum of products (up, down) of any ranks."""
    return svd_of_product(*side_by_side(products))


def side_by_side(products: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One product, of the ranks together, that equals a sum of products (up, down)."""
    return torch.cat([up for up, _ in products], 1), torch.cat([down for _, down in products])


def truncated_svd(
    matrix: Tensor, rank: int, *, tolerance: float = TOLERANCE, generator: torch.Generator | None = None
) -> Svd:
    """The largest singular values of a full matrix (out, in): `rank` of them, or all where there are fewer.

    Block Krylov iteration (Musco, Musco 2015, arXiv:1504.05477) from a random start; exact where that costs less. Its
    product is a projection of the matrix, so that `captured` says exactly how good it is.

    Args:
        tolerance: the share by which the captured energy may be less than that of the exact decomposition. Steps end
            when one adds less than a quarter of it: what all later ones would add is less than that one, also for
            noise, whose singular values hardly fall.
        generator: of the matrix's device; None: the same directions every time.
    """
    smaller = min(matrix.shape)
    width = min(rank + OVERSAMPLING, smaller)
    if 2 * width >= smaller:
        return exact_svd(matrix, rank)
    if generator is None:
        generator = torch.Generator(matrix.device).manual_seed(0)
    probe = torch.randn(matrix.shape[1], width, generator=generator, device=matrix.device, dtype=matrix.dtype)
    block = torch.linalg.qr(matrix @ probe).Q
    basis, inside, energy = block, block.T @ matrix, 0.0
    while True:
        wide = inside.double()
        energies, vectors = torch.linalg.eigh(wide @ wide.T)  # squared singular values, ascending
        before, energy = energy, float(energies[-rank:].sum())
        if energy - before <= tolerance / 4 * energy:
            s, u = energies[-rank:].flip(0).clamp(min=0).sqrt(), vectors[:, -rank:].flip(1)
            there = s > s[0] * torch.finfo(matrix.dtype).eps  # what is less is rounding, and has no direction
            vh = u.T @ wide * torch.where(there, 1 / s, 0)[:, None]
            s = torch.where(there, s, 0)
            return Svd(basis @ u.to(basis), s.to(matrix), vh.to(matrix))
        if 2 * (basis.shape[1] + width) > smaller:
            return exact_svd(matrix, rank)
        block = matrix @ inside[-width:].T
        for _ in range(2):  # once leaves what rounding has mixed in
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        basis, inside = torch.cat([basis, block], 1), torch.cat([inside, block.T @ matrix])


def exact_svd(matrix: Tensor, rank: int) -> Svd:
    """`truncated_svd` by the full decomposition, which takes many times as long for large matrices."""
    found = Svd(*torch.linalg.svd(matrix, full_matrices=False))
    return Svd(found.u[:, :rank], found.s[:rank], found.vh[:rank])


def captured(matrix: Tensor, svd: Svd) -> float:
    """The share of a matrix's squared Frobenius norm that its `truncated_svd` has: 0 to 1; 1 where all is zero."""
    total = float(matrix.double().square().sum()) if matrix.numel() else 0.0
    return min(float(svd.s.double().square().sum()) / total, 1.0) if total else 1.0


def clamped(up: Tensor, down: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Both factors limited to +-q, where q is the quantile (0 to 1) of all their values, interpolated linearly.

    It cuts off the few outliers that the singular values leave in `up`. 1 leaves all as it is.
    """
    if quantile >= 1:
        return up, down
    values = torch.cat([up.flatten(), down.flatten()]).sort().values  # torch.quantile takes 2^24 values at most
    place = quantile * (len(values) - 1)
    below = int(place)
    limit = abs(float(torch.lerp(values[below], values[min(below + 1, len(values) - 1)], place - below)))
    return up.clamp(-limit, limit), down.clamp(-limit, limit)


def flattened(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices of a file as float32: up (out, r) of (out, r[, 1, 1]), down (r, in k k) of (r, in[, k, k])."""
    return up.flatten(1).float(), down.flatten(1).float()


def restored(up: Tensor, down: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Factors in the shapes that files have, for a weight of the shape (out, in) or (out, in, k, k)."""
    if len(shape) == 2:
        return up, down
    return up[:, :, None, None], down.reshape(len(down), *shape[1:])
