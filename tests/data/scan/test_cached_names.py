"""Images that are gone, known by the latents beside them."""

from __future__ import annotations

import numpy as np
import pytest

from library.data.scan.cached_names import Prepared
from library.data.scan.index import FileIndex


@pytest.fixture
def prepared():
    return Prepared(FileIndex(None).listing)


@pytest.mark.parametrize(
    ("name", "arrays", "expected"),
    [
        ("a_0010x0020_sd.npz", {"original_size": np.array([130, 97])}, (10, 20)),  # the name is enough
        ("a_0512x12345_other.npz", {"x": np.ones(1)}, (512, 12345)),
        ("a.npz", {"latents": np.ones(1), "original_size": np.array([130, 97])}, (130, 97)),
        ("a.npz", {"arr_0": np.ones(1)}, None),
        ("a.npz", {"original_size": np.array(["a", "b"])}, None),
        ("a.npz", {"original_size": np.array([0, 5])}, None),
        ("a.npz", None, None),
        ("a_b_sd.npz", None, None),
        ("aa_0010x0020_sd.npz", None, None),
    ],
)
def test_the_size_of_an_image_that_is_gone(tmp_path, prepared, name, arrays, expected):
    if arrays is None:
        (tmp_path / name).write_bytes(b"damaged")
    else:
        np.savez(tmp_path / name, **arrays)
    assert prepared.size(tmp_path / "a") == expected


def test_stems_may_hold_dots_and_underscores(tmp_path, prepared):
    (tmp_path / "v1.5_image 2_0640x0480_sd.npz").write_bytes(b"x")
    assert prepared.size(tmp_path / "v1.5_image 2") == (640, 480)


@pytest.mark.rows("R110")
def test_a_file_of_mirrored_latents_is_seen(tmp_path, prepared):
    (tmp_path / "v1.5_flip.npz").write_bytes(b"x")
    assert prepared.has_flip_file(tmp_path / "v1.5")
    assert not prepared.has_flip_file(tmp_path / "v1")
