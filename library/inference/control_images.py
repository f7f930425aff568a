"""The control images of sample prompts: reading them, and what a ControlNet gets of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from library.data.sample import images
from library.errors import UserError
from library.inference.prompts import SamplePrompt
from library.types import Size

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def with_control(prompt: SamplePrompt) -> SamplePrompt:
    """The prompt with its control image read and resized to the size of the sample; without one it stays as it is.

    Raises: UserError: the file cannot be read.
    """
    control = prompt.control
    if control is None or control.pixels is not None:
        return prompt
    try:
        values = images.read_values(control.path)
    except (OSError, ValueError) as error:
        reason = images.reason(error)
        raise UserError(f"--cn {control.path}: the control image cannot be read ({reason})") from None
    pixels = images.resize_values(values, Size(prompt.width, prompt.height))
    return replace(prompt, control=replace(control, pixels=pixels))


def control_batch(prompts: Sequence[SamplePrompt], device: torch.device) -> Tensor | None:
    """`Batch.control` of prompts that all have a control image, or none of them: (B, 3, H, W) in [0, 1], or None.

    Raises: UserError: a file cannot be read.
    """
    import torch

    if prompts[0].control is None:
        return None
    return torch.stack([images.to_unit(with_control(prompt).control.pixels) for prompt in prompts]).to(device)
