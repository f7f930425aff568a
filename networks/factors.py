"""Factors of layer widths, by which weights are cut into blocks. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable


def factors(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of `dimension`, the smaller one first.

    One of them is `factor` where that divides the dimension. Otherwise the smaller one is the largest divisor up to
    `factor`, or with -1 up to the root, so that both are as close as they can be.

    Source: the rule of LyCORIS for LoKr, OFT.
    """
    if factor > 0 and dimension % factor == 0:
        small = factor
    else:
        most = dimension if factor < 0 else factor
        small = max(n for n in range(1, math.isqrt(dimension) + 1) if dimension % n == 0 and n <= max(most, 1))
    return min(small, dimension // small), max(small, dimension // small)


def power_of_two_factors(dimension: int, factor: int = -1) -> tuple[int, int]:
    """(b, n) with ``b n = dimension``, b even and at most `factor`, and n a power of two; the largest such b.

    Source: the rule of LyCORIS for BOFT. Raises: ValueError: there are none.
    """
    most = dimension if factor == -1 else factor
    for size in range(most - most % 2, 1, -2):
        count, rest = divmod(dimension, size)
        if not rest and count & (count - 1) == 0:
            return size, count
    raise ValueError(f"{dimension} rows cannot be cut into 2^n blocks of an even size up to {most}")


def nearest_divisor(number: int, wanted: int, fits: Callable[[int], bool] = lambda divisor: True) -> int | None:
    """The divisor of `number` next to `wanted`, the smaller one of two, among those that fit; None: none does."""
    divisors = (divisor for divisor in range(1, number + 1) if number % divisor == 0 and fits(divisor))
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor), default=None)
