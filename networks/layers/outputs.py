"""What types share whose outputs replace those of live modules, rather than being added to them."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor


def blended(output: Tensor, adapted: Tensor, multiplier: float) -> Tensor:
    """`output` at a multiplier of 0, to the bit, and `adapted` at 1, in the dtype of `output`.

    At 1 no gradient flows through `output`, so that the live module needs no backward pass of its own.
    """
    if multiplier == 1:
        return adapted.to(output.dtype)
    return output + ((adapted - output) * multiplier).to(output.dtype)


class OncePerInput:
    """Computes a tensor once for all modules of a fused layer, which are called with one and the same input.

    It is held until the last of them has it, or the input is gone: no other forward pass sees it.
    """

    def __init__(self, users: int):
        self._users, self._left = users, 0
        self._value: Tensor | None = None
        self._input: weakref.ref[Tensor] | None = None
        self._with_grad = False

    def of(self, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """`compute`'s tensor, for a module that was called with `x`."""
        if self._users == 1 or torch.compiler.is_compiling():
            return compute()
        same = self._input is not None and self._input() is x and self._with_grad == torch.is_grad_enabled()
        if not same or self._value is None:
            self._value, self._left = compute(), self._users
            self._input, self._with_grad = weakref.ref(x), torch.is_grad_enabled()
        value, self._left = self._value, self._left - 1
        if not self._left:
            self._value = self._input = None
        return value
