"""Factors of layer widths. Reference: lycoris' functions, over many widths."""

from __future__ import annotations

import pytest

from networks.factors import factors, power_of_two_factors

general = pytest.importorskip("lycoris.functional.general")
WIDTHS = [*range(1, 130), 250, 320, 360, 512, 640, 1023, 1024, 1280, 3072]


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 7, 8, 16, 100, 4096])
def test_factors_are_those_of_lycoris(factor):
    assert [factors(width, factor) for width in WIDTHS] == [general.factorization(width, factor) for width in WIDTHS]


def test_factors_are_whole_and_as_close_as_they_can_be_by_default():
    assert (factors(360), power_of_two_factors(360)) == ((18, 20), (360, 1))
    assert [type(number) for number in (*factors(360, 8), *factors(7, 4))] == [int] * 4


@pytest.mark.parametrize("factor", [-1, 2, 3, 4, 6, 8, 9, 16, 100])
def test_blocks_of_powers_of_two_are_those_of_lycoris(factor):
    """Largest blocks first. lycoris gives None where there are none."""
    for width in WIDTHS[1:]:
        size, count = general.power2factorization(width, factor)
        if size is None:
            with pytest.raises(ValueError, match=f"{width} rows cannot be cut"):
                power_of_two_factors(width, factor)
        else:
            found = power_of_two_factors(width, factor)
            assert found[0] * found[1] == width
            assert found == (size, count)
