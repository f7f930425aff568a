"""Which xformers goes with which torch. The pairs are what the releases ask for in their metadata."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.install_xformers import BUILT_FOR, STABLE, release_for

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("torch_version", "cuda", "release"),
    [
        ("2.6.0+cu124", "12.4", "0.0.29.post3"),
        ("2.7.1+cu126", "12.6", "0.0.31.post1"),
        ("2.9.0", "12.8", "0.0.33.post1"),
        ("2.9.1", "12.8", "0.0.33.post2"),
        ("2.10.0", "12.8", "0.0.35"),
        ("2.13.0+cu126", "12.6", "0.0.35"),
        ("3.0.0+cu128", "12.8", "0.0.35"),
    ],
)
def test_the_release_for_a_torch(torch_version, cuda, release):
    assert release_for(torch_version, cuda)[0] == release


@pytest.mark.parametrize(
    ("torch_version", "cuda", "reason"),
    [
        ("2.13.0+cpu", None, "without CUDA"),
        ("2.13.0", "13.0", "CUDA 13.0"),
        ("2.8.1", "12.8", "no release was built for torch 2.8.1"),
        ("2.5.1", "12.4", "no release was built for torch 2.5.1"),
    ],
)
def test_none_and_why(torch_version, cuda, reason):
    release, why = release_for(torch_version, cuda)
    assert release is None
    assert reason in why


def test_the_requirement_allows_them_all():
    text = (ROOT / "requirements" / "xformers.txt").read_text(encoding="utf-8")
    low, high = re.search(r"^xformers>=([\w.]+),<([\w.]+);", text, flags=re.MULTILINE).groups()

    def key(version: str) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", version)))

    assert all(key(low) <= key(release) < key(high) for release in (*BUILT_FOR.values(), STABLE))
