"""Files in ComfyUI's fp8_scaled form."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

LARGEST = 448.0  # of float8_e4m3fn


def fp8_scaled(
    tensors: Mapping[str, Tensor],
    chosen: Callable[[str, Tensor], bool],
    *,
    name: str = "scale_weight",
    prefix: str = "",
    with_input: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of 8 bits and their scales, for the matrices that are `chosen`; and what they stand for, in float32.

    Args:
        name: of the scales.
        prefix: before the marker.
    """
    stored: dict[str, Tensor] = {f"{prefix}scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    meant: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not (key.endswith(".weight") and tensor.ndim == 2 and chosen(key, tensor)):
            stored[key] = meant[key] = tensor
            continue
        layer = key.removesuffix(".weight")
        scale = tensor.float().abs().max() / LARGEST
        stored[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        stored[f"{layer}.{name}"] = scale
        if with_input:
            stored[f"{layer}.{name.replace('weight', 'input')}"] = torch.tensor(0.5)
        meant[key] = stored[key].float() * scale
    return stored, meant
