"""The control images of sample prompts: reading them, and what a ControlNet gets of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from library.data.sample import images
from library.errors import UserError
from library.inference.prompts import ControlImage, SamplePrompt
from library.types import Size

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.families.base import Family
    from library.types import Models


def with_control(prompt: SamplePrompt) -> SamplePrompt:
    """The prompt with its control image read and resized to the size of the sample; without one it stays as it is.

    Raises: UserError: the file cannot be read.
    """
    if prompt.control is None:
        return prompt
    return replace(prompt, control=_read(prompt.control, Size(prompt.width, prompt.height), "--cn "))


def _read(control: ControlImage, size: Size, option: str) -> ControlImage:
    if control.pixels is not None:
        return control
    try:
        values = images.read_values(control.path)
    except (OSError, ValueError) as error:
        reason = images.reason(error)
        raise UserError(f"{option}{control.path}: the control image cannot be read ({reason})") from None
    pixels = images.resize_values(values, size)
    return replace(control, pixels=pixels if control.prepare is None else control.prepare(pixels))


def encode_control(
    family: Family,
    models: Models,
    prompts: Sequence[SamplePrompt],
    generators: list[torch.Generator],
    device: torch.device,
) -> Tensor | None:
    """`Batch.control_latents` of prompts, drawn by each image's own generator; None: the denoiser reads none.

    Raises: UserError: a prompt has no control image, or it cannot be read.
    """
    if not family.denoiser.control_channels(models):
        return None
    pixels = control_batch(prompts, device)
    if pixels is None:
        raise UserError("no control image, which the model reads with this network; give one for each prompt")
    return family.latents.scale(family.latents.encode(models, pixels * 2 - 1, generators)).float()


def control_batch(prompts: Sequence[SamplePrompt], device: torch.device) -> Tensor | None:
    """`Batch.control` of prompts that all have control images, or none of them: (B, 3, H, W) in [0, 1], or None.

    Of prompts with `guides`, these follow each other: (B, 3 n, H, W).

    Raises: UserError: a file cannot be read.
    """
    import torch

    if prompts[0].control is None and not prompts[0].guides:
        return None
    rows = []
    for prompt in prompts:
        read = [_read(guide, Size(prompt.width, prompt.height), "") for guide in prompt.guides]
        rows.append(torch.cat([images.to_unit(one.pixels) for one in read or [with_control(prompt).control]]))
    return torch.stack(rows).to(device)
