"""Prompts of several parts: how each is read, and where in the image it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.data.sample import images
from library.errors import UserError
from library.types import TextCond

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from library.inference.prompts import RegionMask, SamplePrompt

NO_NETWORK = -1
_BY_CHANNEL = 3  # parts that have a channel of the mask


@dataclass(frozen=True)
class Reading:
    """A text that is read otherwise than it would be by itself."""

    text: str
    network: int | None = None  # the only attached network that acts on text encoders, or NO_NETWORK; None: all of them
    image: Path | None = None  # what CLIP sees in place of the pooled text; None: the pooled text


Text = str | Reading


@dataclass(frozen=True)
class CoupledText(TextCond):
    """The conditioning of a prompt's parts, which cross-attention reads each in its region.

    As a `TextCond` it is that of the last part, which is what else is conditioned by text reads.
    """

    parts: tuple[TextCond, ...]

    @staticmethod
    def of(parts: Sequence[TextCond]) -> CoupledText:
        return CoupledText(parts[-1].tensors, tuple(parts))

    def stacked(self) -> TextCond:
        """Sequences, (B, ..., tokens, width), of all parts as (B, parts, ..., tokens, width); pooled texts as above."""
        import torch

        return TextCond(
            {
                name: torch.stack([part.tensors[name] for part in self.parts], dim=1) if value.ndim > 2 else value
                for name, value in self.tensors.items()
            }
        )


def positive_texts(prompt: SamplePrompt) -> list[Text]:
    """What is read for the prompt, part by part. In regions, each part is read with the network of its place."""
    if prompt.regions is not None:
        return [Reading(part, number, prompt.seen) for number, part in enumerate(prompt.parts)]
    texts = prompt.parts or (prompt.prompt,)
    return list(texts) if prompt.seen is None else [Reading(text, image=prompt.seen) for text in texts]


def negative_text(prompt: SamplePrompt, text: str) -> Text:
    """What is read for the other side of guidance. Beside regions no network acts on it."""
    return text if prompt.regions is None else Reading(text, NO_NETWORK)


def words_of(text: Text) -> str:
    return text if isinstance(text, str) else text.text


def read_masks(mask: RegionMask, count: int, device: torch.device) -> Tensor:
    """Where each of `count` parts counts: (count, H, W), float32 in [0, 1], of the size that the file has.

    The red, green and blue of the image are the regions of the first three parts. With `mask.colors`, a part's region
    has the color whose bits, red 1, green 2 and blue 4, are its number from 1 on. A region that is empty, and that of
    a part without a channel or color, is the whole image.

    Raises: UserError: the file cannot be read.
    """
    import torch

    try:
        pixels = images.read_values(mask.path)
    except (OSError, ValueError) as error:
        raise UserError(f"{mask.path}: the mask cannot be read ({images.reason(error)})") from None
    values = images.to_unit(pixels).to(device)
    bits = values >= 0.5
    found = []
    for number in range(count):
        region = torch.zeros_like(values[0])
        if mask.colors is not None and number < mask.colors:
            wanted = torch.tensor([bool((number + 1) >> bit & 1) for bit in range(3)], device=device)
            region = (bits == wanted[:, None, None]).all(0).float()
        elif mask.colors is None and number < _BY_CHANNEL:
            region = values[number]
        found.append(region if region.any() else torch.ones_like(region))
    return torch.stack(found)
