"""Exponential moving average (EMA) of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_CHUNK = 1 << 26  # elements: 0.25 GiB in float32


class EMA:
    """Exponential moving average of parameters: ``average += (1 - decay) * (parameter - average)`` after each step.

    The decay is warmed up, min(decay, (1 + step) / (10 + step)), so that the random initial weights soon lose their
    influence. The average is kept in float32 on the parameters' device and never waits for it. Parameters of other
    dtypes are cast at most `most` elements at a time, or one parameter where that is larger.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float, most: int = _CHUNK):
        self._parameters = list(parameters)
        self._decay = decay
        self._average = [parameter.detach().float().clone() for parameter in parameters]
        self._chunks = list(_chunks(self._parameters, most))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the current parameters to the average. `step`: optimizer steps done."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for chunk in self._chunks:
            torch._foreach_lerp_(self._average[chunk], [p.float() for p in self._parameters[chunk]], 1 - decay)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Within the block the parameters hold the average; afterwards their own values, bit for bit."""
        kept = [parameter.detach().clone() for parameter in self._parameters]
        for parameter, average in zip(self._parameters, self._average, strict=True):
            parameter.copy_(average)
        try:
            yield
        finally:
            for parameter, value in zip(self._parameters, kept, strict=True):
                parameter.copy_(value)

    @torch.no_grad()
    def restart(self) -> None:
        """Sets the average to the current parameters."""
        for average, parameter in zip(self._average, self._parameters, strict=True):
            average.copy_(parameter)

    def state_dict(self) -> dict[str, Tensor]:
        return {str(number): average for number, average in enumerate(self._average)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises: ValueError: the average of other parameters."""
        for number, average in enumerate(self._average):
            if state[str(number)].shape != average.shape:
                raise ValueError(f"average {number} has the shape {list(state[str(number)].shape)}")
            average.copy_(state[str(number)])


def _chunks(parameters: Sequence[Tensor], most: int) -> Iterator[slice]:
    start, size = 0, 0
    for number, parameter in enumerate(parameters):
        if number > start and size + parameter.numel() > most:
            yield slice(start, number)
            start, size = number, 0
        size += parameter.numel()
    yield slice(start, len(parameters))
