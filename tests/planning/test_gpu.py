"""The device that stands for a GPU computes as CUDA does, as far as shapes, dtypes and kernels go."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from library.planning import gpu


def listed(macro: str) -> set[str]:
    """The operations of one of torch's own lists for autocast, in its header."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    text = header.read_text(encoding="utf-8")
    body = text.partition(f"#define {macro}(_)")[2].partition("\n\n")[0].partition("#define")[0]
    found = re.findall(r"_\((\w+)(?:, (\w+))?\)", body)
    return {name if not overload else f"{name}.{overload}" for name, overload in found}


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the lists are those of torch 2.13")
@pytest.mark.parametrize(
    ("macro", "ours"),
    [
        ("AT_FORALL_LOWER_PRECISION_FP", gpu.LOWER_PRECISION),
        ("AT_FORALL_FP32", gpu.FLOAT32),
        ("AT_FORALL_FP32_SET_OPT_DTYPE", gpu.FLOAT32_RESULT),
        ("AT_FORALL_PROMOTE", gpu.WIDEST),
    ],
)
def test_autocast_has_the_operations_of_torch(macro, ours):
    assert set(ours.split()) == listed(macro)
