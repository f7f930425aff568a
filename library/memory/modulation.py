"""Modulation layers whose weights stay in CPU memory: what they give depends on time and text alone, not on the image.

A transformer's blocks scale and shift their normed inputs by linear functions of one vector for each image, the
embedding of its time, guidance and pooled text (adaLN: Peebles & Xie 2022, arXiv:2212.09748). In FLUX.1 these layers
hold a quarter of the weights. Frozen, they can be computed for several batches ahead, layer by layer, each brought to
the device once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.memory.copying import host_buffer


class EvictedModulation:
    """Keeps frozen modulation layers in CPU memory, from when it is made: make it before the model is moved or cast.

    In a batch whose outputs were computed ahead the layers give these, without gradients; everywhere else, as in
    validation and sample images, each call brings the layer's weights to the device for itself. Results are the same to
    the bit: each batch has a product of its own. Hooks on the layers, such as those of adapters, act as ever.
    """

    def __init__(self, embedding: nn.Module, layers: Sequence[nn.Module], device: torch.device):
        """
        Args:
            embedding: gives the vector of each image, (B, D), of which the layers take the SiLU.
            layers: linear layers, (B, D) to (B, n D).
        """
        self._device, self._layers = device, list(layers)
        self._ahead: dict[int, list[Tensor]] = {}  # outputs of all layers, by the number of the batch
        self._now: list[Tensor] | None = None
        self._looking = False
        embedding.register_forward_hook(self._embedded)
        for index, layer in enumerate(self._layers):
            layer._apply = partial(_apply_in_cpu_memory, layer)
            layer.forward = partial(self._forward, index, layer)

    def pin(self) -> None:
        """Moves the weights to pinned memory, from which a CUDA device copies fastest. Call it when they are cast."""
        if self._device.type != "cuda":
            return
        for tensor in (tensor for layer in self._layers for tensor in _tensors(layer)):
            pinned = host_buffer(tensor.nbytes, self._device)[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            tensor.data = pinned.copy_(tensor.data)

    @property
    def bytes_evicted(self) -> int:
        return sum(tensor.nbytes for layer in self._layers for tensor in _tensors(layer))

    def embed(self, predict: Callable[[], Any]) -> Tensor:
        """The vectors, (B, D), that the model embeds in `predict`, which ends there."""
        self._looking = True
        try:
            predict()
        except _Embedded as found:
            return found.vectors
        finally:
            self._looking = False
        raise RuntimeError("the model has embedded nothing")

    @torch.no_grad()
    def compute(self, vectors: Mapping[int, Tensor]) -> None:
        """Computes all outputs of batches, whose vectors are given by number; in the caller's autocast."""
        inputs = {number: F.silu(one) for number, one in vectors.items()}
        self._ahead = {number: [] for number in inputs}
        for layer in self._layers:
            with _brought(layer, self._device):
                for number, x in inputs.items():
                    self._ahead[number].append(type(layer).forward(layer, x))

    @contextmanager
    def batch(self, number: int) -> Iterator[None]:
        """A context for the forward and backward pass of a batch, whose outputs are dropped at its end."""
        self._now = self._ahead.pop(number, None)
        try:
            yield
        finally:
            self._now = None

    def _forward(self, index: int, layer: nn.Module, x: Tensor) -> Tensor:
        if self._now is not None:
            output = self._now[index]
            return output.clone() if layer._forward_hooks else output  # adapters may add to it in place
        with torch.no_grad(), _brought(layer, self._device):
            return type(layer).forward(layer, x)

    def _embedded(self, _module: nn.Module, _args: tuple[Any, ...], vectors: Tensor) -> None:
        if self._looking:
            raise _Embedded(vectors.detach())


class _Embedded(Exception):
    """Ends a forward pass once the vectors are there."""

    def __init__(self, vectors: Tensor):
        super().__init__()
        self.vectors = vectors


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(), *layer.buffers()]


@contextmanager
def _brought(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """A context in which the layer's weights are on `device`."""
    homes = [(tensor, tensor.data) for tensor in _tensors(layer)]
    try:
        for tensor, home in homes:
            tensor.data = home.to(device, non_blocking=True)
        yield
    finally:
        for tensor, home in homes:
            tensor.data = home


def _apply_in_cpu_memory(layer: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replaces `Module._apply`, which moves and casts: casts only."""
    for tensor in _tensors(layer):
        tensor.data = tensor.data.to("cpu", change(tensor.new_empty(0)).dtype)
    return layer
