"""Images in place of the text as a whole: what CLIP's vision gives for one takes the place of the pooled text.

Known as revision: Stability AI, "Control-LoRA and Revision" (https://huggingface.co/stabilityai/control-lora).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.data.sample import images
from library.errors import UserError
from library.preparation.captioning.pretrained import load, load_model
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.options.inference_images import SourceOptions
    from library.types import FamilyTraits

_OPTION = "--clip_vision_model"


@dataclass
class Vision:
    """A CLIP vision model with its projection, and the strength of what it gives."""

    model: nn.Module
    processor: Any
    strength: float
    _seen: dict[Path, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def see(self, path: Path) -> Tensor:
        """What the image is to CLIP, times the strength: (1, projection), float32 on the CPU.

        Raises: UserError: the image cannot be read.
        """
        if path not in self._seen:
            try:
                pixels = images.read_values(path)
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: the image cannot be read ({images.reason(error)})") from None
            first = next(self.model.parameters())
            inputs = self.processor(images=pixels, return_tensors="pt")["pixel_values"]
            seen = self.model(pixel_values=inputs.to(first.device, first.dtype)).image_embeds
            self._seen[path] = seen.float().cpu() * self.strength
        return self._seen[path]


def load_vision(
    options: SourceOptions, traits: FamilyTraits, device: torch.device, dtype: torch.dtype
) -> Vision | None:
    """The vision model of the options; None: none is asked for, or the family has no use for it.

    Args: dtype: of its weights.
    Raises: UserError: it cannot be read.
    """
    if options.clip_vision_strength is None or not traits.pooled_by_image:
        return None
    from transformers import CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    name = options.clip_vision_model
    try:
        model = load_model(name, CLIPVisionModelWithProjection, "a CLIP vision model with its projection", dtype=dtype)
        processor = load(name, CLIPImageProcessorPil.from_pretrained, "what makes a CLIP vision model's inputs")
    except UserError as error:
        raise UserError(*(f"{_OPTION}: {problem}" for problem in error.problems)) from None
    LOGGER.info("%s: sees images in place of pooled texts", name)
    return Vision(model.to(device), processor, options.clip_vision_strength)
