"""The options of inpainting_minimal_inference.py. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from library.families.shared.minimal import MinimalOptions, renamed
from library.options.base import opt

_STEP = 64  # pixels; sides are floored to multiples of it


@dataclass(frozen=True, kw_only=True)
class InpaintingMinimalOptions(MinimalOptions, without=("interactive",)):
    names: ClassVar[Mapping[str, str]] = {"scale": "guidance_scale", "image_path": "image", "mask_path": "mask"}
    keeps_surroundings: ClassVar[bool] = True

    image: str | None = opt(None, "the image of which a part is drawn again", exists="file", required=True)
    mask: str | None = opt(None, "image that is white where something is drawn", exists="file", required=True)
    prompt: str = opt("", "what the image shows")
    width: int = opt(512, "width in pixels, floored to a multiple of 64", at_least=_STEP)
    height: int = opt(512, "height in pixels, floored to a multiple of 64", at_least=_STEP)
    steps: int = opt(30, "denoising steps", at_least=1, at_most=1000)
    guidance_scale: float = opt(7.5, "guidance scale; 1 makes no use of the negative prompt")
    seed: int | None = opt(None, "seed of the image; another one each time if not given", at_least=0)
    sdxl: bool = opt(False, "the model is SDXL; found out by its file where it is not given")

    @property
    def family(self) -> str | None:
        return "sdxl" if self.sdxl else None

    def generating(self) -> dict[str, Any]:
        ours = renamed(vars(self), scale="guidance_scale", image_path="image", mask_path="mask")
        sides = {"W": self.width // _STEP * _STEP, "H": self.height // _STEP * _STEP}
        settings = {"sampler": "euler", "strength": 1.0, "bf16": True, "steps": self.steps, "seed": self.seed}
        return {**super().generating(), **ours, **sides, **settings}
