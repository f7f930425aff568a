"""What types share whose outputs replace those of live modules, rather than being added to them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

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
        self._users, self._left = users, users
        self._served: set[int] = set()
        self._value: Tensor | None = None
        self._input: weakref.ref[Tensor] | None = None
        self._state: tuple[Any, ...] = ()

    def of(
        self, x: Tensor, compute: Callable[[], Tensor], made_of: Sequence[Tensor] = (), user: int | None = None
    ) -> Tensor:
        """`compute`'s tensor, for a module that was called with `x`.

        Args:
            made_of: what it depends on, as it is now.
            user: the number of the module; when one comes again, another forward pass has begun.
        """
        if self._users == 1 or torch.compiler.is_compiling():
            return compute()
        state = torch.is_grad_enabled(), *((id(one), _version(one)) for one in made_of)
        same = self._input is not None and self._input() is x and self._state == state and user not in self._served
        if not same or self._value is None:
            self._value, self._left = compute(), self._users
            self._input, self._state = weakref.ref(x), state
            self._served.clear()
        value, self._left = self._value, self._left - 1
        if user is not None:
            self._served.add(user)
        if not self._left:
            self._value = self._input = None
        return value


def _version(tensor: Tensor) -> int:
    """How often it was changed in place; tensors of inference mode do not say."""
    return 0 if tensor.is_inference() else tensor._version
