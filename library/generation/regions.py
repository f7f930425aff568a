"""Regions of an image that read parts of the prompt, each with a network of its own.

In layers where the image reads the text, every part is read as if it were alone, with its network, and the results are
put together by the parts' masks. In all other layers of the denoiser the change that a network makes counts where its
mask says. The other side of guidance has no parts; there, networks act on all but those first layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from library.errors import UserError
from library.generation.parts import too_many
from library.inference.regions import CoupledText
from library.runtime.logs import LOGGER
from networks.network import Network

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.families.base import Family
    from library.types import Batch, Models, Residuals, TextCond
    from networks.network import TrainableNetwork

_NO_PLACE = re.compile(r"time_emb|add_embedding")  # paths of layers whose outputs have no places in the image
_VECTORS = 2  # axes of what has no places in the image, such as the embedded time


class Regions:
    """What of a model acts where.

    Args: networks: those that are attached; the first is that of the first part.
    Raises: UserError: the model cannot have regions, or a network is of another package.
    """

    def __init__(self, family: Family, models: Models, networks: Sequence[TrainableNetwork]):
        self._family, self._models, self._count = family, models, len(networks)
        self._masks: Tensor | None = None  # (parts, H, W); None: all acts everywhere
        self._by_size: dict[tuple[int, int], Tensor] = {}  # the masks
        self._latents = (1, 1)  # height and width
        self._reading: int | None = None  # the part whose network acts where the text is read
        if family.text_layers is None:
            raise UserError(f"prompts of several regions: not possible with {family.traits.label}")
        layers = family.text_layers(models)
        for path in layers:
            attention = models.denoiser.get_submodule(path)
            processor = attention.processor
            inner = processor.inner if isinstance(processor, _InRegions) else processor
            attention.set_processor(_InRegions(inner, self))
        for number, network in enumerate(networks):
            if not isinstance(network, Network):
                raise UserError(
                    f"prompts of several regions: network {number + 1} acts on the whole image, as hypernetworks and "
                    "networks of other packages do; leave it out"
                )
            self._confine(number, network, layers)

    @contextmanager
    def use(self, masks: Tensor) -> Iterator[None]:
        """Within it, everything acts in its region. Args: masks: (parts, H, W) of any size, in [0, 1].

        Raises: UserError: there are more networks than parts.
        """
        if self._count > len(masks):
            raise UserError(too_many(self._count, len(masks)))
        self._masks = masks
        self._by_size.clear()
        try:
            yield
        finally:
            self._masks = None

    def predict(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        cond: TextCond,
        batch: Batch | None = None,
        residuals: Residuals | None = None,
    ) -> Tensor:
        """See `Denoiser.predict`."""
        self._latents = noisy.shape[-2], noisy.shape[-1]
        text = cond.stacked() if isinstance(cond, CoupledText) else cond
        return self._family.denoiser.predict(self._models, noisy, timesteps, text, batch, residuals)

    def read(self, attend: Callable[[Tensor], Tensor], states: Tensor, texts: Tensor) -> Tensor:
        """What a layer gives that reads texts, (B, n, width).

        Args:
            attend: what it gives for one text. states: what goes in, (B, n, width).
            texts: (B, parts, tokens, width).
        """
        masks = self._at_size(_size_of(states.shape[1], self._latents)).flatten(1)
        total = masks.sum(0)
        shares = torch.where(total > 0, masks / total.clamp_min(1e-6), 0)
        # Where no part counts, all are read alike, and without networks.
        wanted: list[tuple[int, int | None, Tensor]] = [(number, number, share) for number, share in enumerate(shares)]
        if (total == 0).any():
            rest = (total == 0).float() / len(masks)
            wanted += [(number, None, rest) for number in range(len(masks))]
        found = 0
        try:
            for number, self._reading, share in wanted:
                found = found + attend(texts[:, number]) * share[None, :, None].to(states.dtype)
        finally:
            self._reading = None
        return found

    def _confine(self, number: int, network: Network, text_layers: Sequence[str]) -> None:
        """Lets a network act in the region of its number only."""
        idle = 0
        for key, layer in network.layers().items():
            target = network.targets[key]
            if target.part != "denoiser":
                continue  # texts are encoded before, see `Networks.only`
            reads = any(path.startswith(f"{place}.") for place in text_layers for path in target.modules)
            layer.within = self._where_text_is_read(number) if reads else self._where_masks_say(number)
            idle += any(_NO_PLACE.search(path) is not None for path in target.modules)
        if idle:
            LOGGER.warning("network %d: %d layers act on no place of the image, and rest in regions", number + 1, idle)

    def _where_text_is_read(self, number: int) -> Callable[[Tensor, Callable[[], Tensor]], Tensor]:
        def within(output: Tensor, adapted: Callable[[], Tensor]) -> Tensor:
            return adapted() if self._masks is None or self._reading == number else output

        return within

    def _where_masks_say(self, number: int) -> Callable[[Tensor, Callable[[], Tensor]], Tensor]:
        def within(output: Tensor, adapted: Callable[[], Tensor]) -> Tensor:
            if self._masks is None:
                return adapted()
            if output.ndim == _VECTORS:
                return output
            if output.ndim == 4:  # (B, channels, h, w)
                mask = self._at_size((output.shape[2], output.shape[3]))[number]
            else:  # (B, h * w, width)
                mask = self._at_size(_size_of(output.shape[1], self._latents))[number].flatten()[:, None]
            mask = mask.to(output.dtype)
            return output * (1 - mask) + adapted() * mask  # exactly one of them where the mask is 0 or 1

        return within

    def _at_size(self, size: tuple[int, int]) -> Tensor:
        """The masks at a layer's size, (parts, h, w), float32."""
        assert self._masks is not None, "only asked for while they are used"
        if size not in self._by_size:
            self._by_size[size] = functional.interpolate(self._masks[None], size=size, mode="area")[0]
        return self._by_size[size]


class _InRegions:
    """A processor of diffusers' `Attention`, which reads the parts of a text by another processor."""

    def __init__(self, inner: Any, regions: Regions):
        self.inner, self._regions = inner, regions

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **more: Any,
    ) -> Tensor:
        def attend(text: Tensor | None) -> Tensor:
            return self.inner(attn, hidden_states, text, *args, **more)

        if encoder_hidden_states is None or encoder_hidden_states.ndim != 4:
            return attend(encoder_hidden_states)
        return self._regions.read(attend, hidden_states, encoder_hidden_states)


def _size_of(places: int, latents: tuple[int, int]) -> tuple[int, int]:
    """Height and width of so many places: the pair whose ratio is nearest to that of the latents."""
    ratio = latents[0] / latents[1]
    heights = [height for height in range(1, places + 1) if places % height == 0]
    height = min(heights, key=lambda height: abs(math.log(height * height / places / ratio)))
    return height, places // height
