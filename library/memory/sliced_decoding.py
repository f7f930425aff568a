"""Decoding of images in slices: the layers of a VAE's decoder work on some rows at a time, with the same result.

What takes memory in decoding are the copies that a resnet makes of features of the image's own size. Norms need sums
over all rows, which are taken first; convolutions need one row more at each edge of a slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def in_slices(decoder: nn.Module, count: int | None) -> Iterator[None]:
    """Inside, the decoder of an AutoencoderKL works on `count` slices below each other; None: on all rows at once.

    Layers of other classes, and those that do more than in such a decoder, work as they always do.
    """
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    changed = []
    if count is not None and count > 1:
        for module in decoder.modules():
            if type(module) is ResnetBlock2D and not (module.upsample or module.downsample or module.time_emb_proj):
                changed.append((module, partial(_resnet, module, count)))
            elif type(module) is Upsample2D and module.use_conv and module.interpolate and module.norm is None:
                changed.append((module, partial(_upsample, module, count)))
    try:
        for module, forward in changed:
            module.forward = forward
        yield
    finally:
        for module, _ in changed:
            module.__dict__.pop("forward", None)


def _slices(rows: int, count: int) -> Iterator[tuple[int, int]]:
    """The first row of each slice and the one behind its last, both even but for the end."""
    step = max(2, 2 * math.ceil(rows / count / 2))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _resnet(module: Any, count: int, features: Tensor, temb: Tensor | None = None) -> Tensor:
    assert temb is None, "a decoder knows no time"
    hidden = _normed_convolution(module.norm1, module.nonlinearity, module.conv1, features, count)
    result = _normed_convolution(module.norm2, module.nonlinearity, module.conv2, hidden, count)
    for first, end in _slices(features.shape[2], count):
        rows = features[:, :, first:end]
        result[:, :, first:end] += rows if module.conv_shortcut is None else module.conv_shortcut(rows)
    return result.div_(module.output_scale_factor)


def _upsample(module: Any, count: int, features: Tensor, output_size: Any = None) -> Tensor:
    assert output_size is None, "a decoder doubles sides"
    convolution, height = (module.conv if module.name == "conv" else module.Conv2d_0), features.shape[2]

    def rows(first: int, end: int) -> Tensor:
        low, high = first // 2, -(-end // 2)
        large = functional.interpolate(features[:, :, low:high], scale_factor=2.0, mode="nearest")
        return large[:, :, first - 2 * low : end - 2 * low]

    return _convolution(convolution, rows, (features.shape[0], 2 * height, 2 * features.shape[3]), features, count)


def _normed_convolution(norm: Any, activation: Any, convolution: Any, features: Tensor, count: int) -> Tensor:
    """``convolution(activation(norm(features)))`` of a group norm and a convolution of 3 x 3."""
    scale, shift = _group_norm(norm, features, count)

    def rows(first: int, end: int) -> Tensor:
        return activation(torch.addcmul(shift, features[:, :, first:end].float(), scale).to(features.dtype))

    batch, _, height, width = features.shape
    return _convolution(convolution, rows, (batch, height, width), features, count)


def _convolution(convolution: Any, rows: Any, size: tuple[int, int, int], like: Tensor, count: int) -> Tensor:
    """A convolution of 3 x 3 with a margin of zeros, over what `rows(first, end)` gives. Args: size: batch, H, W."""
    batch, height, width = size
    result = like.new_empty(batch, convolution.out_channels, height, width)
    for first, end in _slices(height, count):
        above, below = int(first > 0), int(end < height)
        inside = functional.pad(rows(first - above, end + below), (1, 1, 1 - above, 1 - below))
        result[:, :, first:end] = functional.conv2d(inside, convolution.weight, convolution.bias)
    return result


def _group_norm(norm: Any, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A group norm as a factor and a summand of each channel, (B, C, 1, 1) and float32 both."""
    batch, channels, height, width = features.shape
    groups = (batch, norm.num_groups, -1)
    number = channels // norm.num_groups * height * width
    parts = [features[:, :, first:end] for first, end in _slices(height, count)]
    mean = sum(part.float().reshape(groups).sum(-1, keepdim=True) for part in parts) / number
    mean_square = sum((part.float().reshape(groups) - mean).square_().sum(-1, keepdim=True) for part in parts) / number
    factor = (mean_square + norm.eps).rsqrt()

    def of_channels(values: Tensor) -> Tensor:
        return values.expand(batch, norm.num_groups, channels // norm.num_groups).reshape(batch, channels)

    weight, bias = norm.weight.float(), norm.bias.float()
    scale = of_channels(factor) * weight
    shift = bias - of_channels(mean) * scale
    return scale[:, :, None, None], shift[:, :, None, None]
