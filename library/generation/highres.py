"""Highres fix: images are drawn small first, enlarged, and drawn again from there."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from library.errors import UserError
from library.inference.generate import decode
from library.inference.images import to_images
from library.inference.prompts import MIN_SIDE, SamplePrompt, SourceImage
from library.methods.network_spec import split_args

if TYPE_CHECKING:
    from torch import Tensor

    from library.generation.model import Model
    from library.options.inference_images import HighresOptions

_STEP = 32  # pixels; sides of the first drawing are multiples of it


@dataclass(frozen=True)
class Highres:
    """How images are drawn twice."""

    scale: float
    steps: int  # of the first drawing
    strength: float | None  # of the first drawing, where it begins with an image; None: the prompt's
    latents: bool  # latents are enlarged, in place of images
    upscaler: Any  # has `upscale(images, width, height)`; None: Lanczos
    keeps_control: bool  # in the second drawing

    @classmethod
    def of(cls, options: HighresOptions) -> Highres | None:
        """As the options say; None: images are drawn once. Raises: UserError: a module that cannot be used."""
        if options.highres_fix_scale is None:
            return None
        name, upscaler = options.highres_fix_upscaler, None
        if name:
            entries = [entry for entry in (options.highres_fix_upscaler_args or "").split(";") if entry]
            arguments: Mapping[str, str] = split_args(entries)
            try:
                upscaler = importlib.import_module(name).create_upscaler(**arguments)
            except UserError:
                raise
            except Exception as error:  # another's code may raise anything
                raise UserError(
                    f"--highres_fix_upscaler: {name} cannot be used: {type(error).__name__}: {error}"
                ) from error
        return cls(
            options.highres_fix_scale,
            options.highres_fix_steps,
            options.highres_fix_strength,
            options.highres_fix_latents_upscaling,
            upscaler,
            not options.highres_fix_disable_control_net,
        )

    def first(self, prompt: SamplePrompt) -> SamplePrompt:
        """The prompt of the first drawing."""
        width, height = (
            max(MIN_SIDE, int(side * self.scale) // _STEP * _STEP) for side in (prompt.width, prompt.height)
        )
        strength = prompt.strength if self.strength is None else self.strength
        return replace(prompt, width=width, height=height, steps=self.steps, strength=strength)

    def second(self, prompt: SamplePrompt) -> SamplePrompt:
        """The prompt of the second drawing, but for what it begins with."""
        guides = prompt.guides if self.keeps_control else ()
        mask = prompt.source and prompt.source.mask
        source = SourceImage(Path("the first drawing"), mask)
        return replace(prompt, seed=(prompt.seed or 0) + 1, guides=guides, source=source)

    def with_first(
        self, model: Model, prompts: Sequence[SamplePrompt], latents: Tensor, dtype: torch.dtype
    ) -> list[SamplePrompt]:
        """The prompts of the second drawing of a batch, with the first one enlarged.

        Args:
            prompts: as the user gave them.
            latents: of the first drawing, (B, C, h, w), scaled.
            dtype: of decoding.
        """
        second = [self.second(prompt) for prompt in prompts]
        width, height, stride = prompts[0].width, prompts[0].height, model.family.traits.latent_stride
        if self.latents:
            size = (height // stride, width // stride)
            larger = functional.interpolate(latents, size=size, mode="bicubic").cpu()
            return [_beginning(prompt, latents=one) for prompt, one in zip(second, larger, strict=True)]
        import numpy as np
        from PIL import Image

        images = to_images(decode(model.family, model.models, latents, dtype))
        if self.upscaler is None:
            images = [image.resize((width, height), Image.Resampling.LANCZOS) for image in images]
        else:
            images = list(self.upscaler.upscale(images, width, height))
            if len(images) != len(second) or any(image.size != (width, height) for image in images):
                sizes = ", ".join(f"{image.width}x{image.height}" for image in images) or "nothing"
                wanted = f"{len(second)} of {width}x{height}"
                raise UserError(f"--highres_fix_upscaler: gave {sizes} where {wanted} are needed")
        pixels = [np.asarray(image.convert("RGB")) for image in images]
        return [_beginning(prompt, pixels=one) for prompt, one in zip(second, pixels, strict=True)]


def _beginning(prompt: SamplePrompt, **values: Any) -> SamplePrompt:
    assert prompt.source is not None
    return replace(prompt, source=replace(prompt.source, **values))
