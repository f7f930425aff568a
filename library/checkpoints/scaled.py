"""8 bit weights with separate scales, as in ComfyUI's fp8_scaled files: what is meant is a weight times its scale.

Beside `<layer>.weight` such files have `<layer>.scale_weight` (newer ones `<layer>.weight_scale`), often
`<layer>.scale_input` for arithmetic in 8 bits, and the marker `scaled_fp8`.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT_SCALES = ("scale_weight", "weight_scale")
OTHERS = ("scale_input", "input_scale", "comfy_quant", "scaled_fp8")  # which say nothing about weights
_WEIGHT = ".weight"


def is_scale(key: str) -> bool:
    """Whether a tensor is not a weight, but belongs to the 8 bit form of others."""
    return key.rpartition(".")[2] in (*WEIGHT_SCALES, *OTHERS)


def scale_of(key: str, keys: Container[str]) -> str | None:
    """The name of a weight's scale among a file's `keys`; None where it has none."""
    if not key.endswith(_WEIGHT):
        return None
    layer = key.removesuffix(_WEIGHT)
    return next((name for scale in WEIGHT_SCALES if (name := f"{layer}.{scale}") in keys), None)


def multiplied(key: str, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight itself, (out, in), float32, on the device of `weight`.

    Args:
        key: of the weight, for messages.
        weight: (out, in), 8 bit floats.
        scale: one number; one for each row, (out,) or (out, 1); or one for each of n equal blocks of a row, (out, n) or
            (out, n, 1).
    Raises: UserError: weights in another format, or scales of another shape.
    """
    if not (weight.is_floating_point() and weight.dtype.itemsize == 1):
        kind = str(weight.dtype).removeprefix("torch.")
        raise UserError(
            f"{key}: weights in {kind} with separate scales cannot be read; of 8 bit files, those in fp8 can, with "
            "scales or without"
        )
    values, factors = weight.float(), scale.to(weight.device).float()
    if factors.numel() == 1:
        return values * factors.reshape(())
    rows, columns = weight.shape[0], weight.numel() // max(weight.shape[0], 1)
    blocks = factors.numel() // max(rows, 1)
    if factors.ndim > 3 or factors.shape[0] != rows or blocks * rows != factors.numel() or columns % blocks:
        raise UserError(f"{key}: scales of shape {tuple(factors.shape)} do not fit weights {tuple(weight.shape)}")
    return (values.reshape(rows, blocks, -1) * factors.reshape(rows, blocks, 1)).reshape(weight.shape)
