"""Quantisation of frozen weights to 8-bit integers or to NF4 (16 levels), by bitsandbytes.

A weight is cut into blocks, row after row. Each block has a scale of its own, its largest absolute value, and every
weight in it becomes the nearest of the levels times that scale.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from library.memory.low_precision import QuantisedConv2d, QuantisedLinear, dequantiser, quantise_frozen

try:
    from bitsandbytes import functional as bnb
except Exception as error:  # whatever a library without its compiled half may raise
    reason = (str(error).splitlines() or [""])[0]
    raise UserError(
        f"--quantize_base: bitsandbytes cannot be imported: {type(error).__name__}: {reason}; install it again, "
        "or choose fp8"
    ) from error

INT8_BLOCK = 256  # weights to a scale: 1 + 4/256 bytes for each
NF4_BLOCK = 64  # 1/2 + 4/64 bytes
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # those that bitsandbytes takes
_INT8_LEVELS: dict[torch.device, Tensor] = {}


def quantise_frozen_to(part: nn.Module, storage_format: str, device: torch.device | None = None) -> int:
    """Turns every frozen linear layer and 2D convolution inside `part` into one with a quantised weight.

    Args:
        storage_format: "int8" is off by at most 1/254 of the largest weight among each 256; "nf4" by 0.152 of the
            largest among each 64, and by 0.066 where a weight is below half of it. bitsandbytes' own rounding adds a
            hundredth to this. Biases, norms and embeddings stay as they are.
        device: where it is computed; else where each weight is. The quantised weights lie where the others were.

    Returns: how many layers were quantised.
    Raises: UserError: bitsandbytes does not work on that device. ValueError: a weight is being trained.
    """
    quantise, kinds = _STORAGE[storage_format]
    for used in {device} if device is not None else {parameter.device for parameter in part.parameters()}:
        # tried out, as a release of bitsandbytes may fail on a device, or give wrong numbers there
        sample = torch.linspace(-1, 1, INT8_BLOCK, device=used)
        try:
            with torch.no_grad():
                kept = kinds[nn.Linear].dequantise(*quantise(sample), sample.shape, sample.dtype)
            off = (kept - sample).abs().max().item()
        except Exception as error:  # a library without its compiled half raises whatever it likes
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"--quantize_base: bitsandbytes does not work on {used}: {type(error).__name__}: {reason}; "
                "try another release of it, or choose fp8"
            ) from error
        if not off < 0.2:
            raise UserError(f"--quantize_base: bitsandbytes gives wrong numbers on {used}; try another release of it")

    def quantise_on_device(weight: Tensor) -> tuple[Tensor, Tensor]:
        bits, scales = quantise(weight.to(device or weight.device))
        return bits.to(weight.device), scales.to(weight.device)

    return quantise_frozen(part, quantise_on_device, kinds)


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(bits, scales): uint8 in the weight's shape; float32 by block as int32, which `Module.to(dtype)` leaves alone."""
    levels = _int8_levels(weight.device)
    bits, state = bnb.quantize_blockwise(_supported(weight), code=levels, blocksize=INT8_BLOCK)
    return bits, state.absmax.view(torch.int32)


@dequantiser("int8")
def from_int8(bits: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight that `to_int8` kept, in `dtype`."""
    given = dtype if dtype in _DTYPES else torch.float32
    absmax, levels = scales.view(torch.float32), _int8_levels(bits.device)
    state = bnb.QuantState(absmax=absmax, code=levels, blocksize=INT8_BLOCK, dtype=given)
    return bnb.dequantize_blockwise(bits, state).to(dtype)


def to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(bits, scales): two weights to each uint8, in one row; scales as `to_int8` has them."""
    # Whole blocks only, filled with zeros: for rests the library compiles code of its own, which needs a C++ compiler.
    flat = _supported(weight).flatten()
    whole = F.pad(flat, (0, -flat.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    bits, state = bnb.quantize_4bit(whole, blocksize=NF4_BLOCK, quant_type="nf4")
    return bits.flatten(), state.absmax.view(torch.int32)


@dequantiser("nf4")
def from_nf4(bits: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight of `shape` that `to_nf4` kept, in `dtype`."""
    given = dtype if dtype in _DTYPES else torch.float32
    state = bnb.QuantState(
        absmax=scales.view(torch.float32),
        shape=torch.Size((scales.numel(), NF4_BLOCK)),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=given,
    )
    whole = bnb.dequantize_4bit(bits.view(-1, 1), state)
    return whole.flatten()[: shape.numel()].view(shape).to(dtype)


class Int8Linear(QuantisedLinear):
    dequantise = staticmethod(from_int8)


class Int8Conv2d(QuantisedConv2d):
    dequantise = staticmethod(from_int8)


class Nf4Linear(QuantisedLinear):
    dequantise = staticmethod(from_nf4)


class Nf4Conv2d(QuantisedConv2d):
    dequantise = staticmethod(from_nf4)


_STORAGE = {
    "int8": (to_int8, {nn.Linear: Int8Linear, nn.Conv2d: Int8Conv2d}),
    "nf4": (to_nf4, {nn.Linear: Nf4Linear, nn.Conv2d: Nf4Conv2d}),
}


def _supported(weight: Tensor) -> Tensor:
    return weight.to(weight.dtype if weight.dtype in _DTYPES else torch.float32).contiguous()


def _int8_levels(device: torch.device) -> Tensor:
    """The whole numbers from -127 to 127, in 127ths, as the 256 float32 values that the library looks them up in."""
    if device not in _INT8_LEVELS:
        _INT8_LEVELS[device] = bnb.create_linear_map().to(device)
    return _INT8_LEVELS[device]
