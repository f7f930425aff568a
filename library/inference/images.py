"""Decoded pixels to PIL images, and PNG files that record how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from library.runtime.durable import replacing

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from library.inference.prompts import SamplePrompt


EXIF, USER_COMMENT = 0x8769, 0x9286  # the table of a camera's settings, and the user's comment in it
_QUALITY = 95  # of JPEG and WebP, of 100


def to_images(pixels: Tensor) -> list[Image]:
    """Pixels (B, 3, H, W), about [-1, 1] and clamped to it, to B RGB images. What is not a number becomes grey."""
    from PIL import Image

    values = pixels.detach().float().nan_to_num(nan=0.0).clamp(-1, 1)
    values = ((values + 1) * 127.5).round().permute(0, 2, 3, 1).cpu().byte().numpy()
    return [Image.fromarray(image) for image in values]


def png_text(prompt: SamplePrompt) -> dict[str, str]:
    """The text of a PNG file about its generation."""
    asked_for = {"guidance": prompt.guidance, "flow-shift": prompt.flow_shift}
    return {
        "prompt": prompt.prompt,
        "negative-prompt": prompt.negative_prompt,
        "seed": str(prompt.seed),
        "sampler": prompt.sampler,
        "steps": str(prompt.steps),
        "scale": str(prompt.scale),
        **({} if prompt.control is None else {"control-image": str(prompt.control.path)}),
        **({} if prompt.source is None else {"source-image": str(prompt.source.path)}),
        **{name: str(value) for name, value in asked_for.items() if value is not None},
    }


def save_png(image: Image, path: Path, text: dict[str, str]) -> None:
    """Writes a PNG file, which has its name when it is whole. Raises: OSError."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    with replacing(path) as unfinished:
        image.save(unfinished, format="PNG", pnginfo=info)


def save_with_comment(image: Image, path: Path, comment: str) -> None:
    """Writes a JPEG or WebP file, by its ending, with a comment where web interfaces look for it. Raises: OSError."""
    from PIL import Image as pillow

    exif = pillow.Exif()
    exif.get_ifd(EXIF)[USER_COMMENT] = b"UNICODE\0" + comment.encode("utf-16-be", "surrogatepass")
    kind = "WEBP" if path.suffix == ".webp" else "JPEG"
    with replacing(path) as unfinished:
        image.save(unfinished, format=kind, quality=_QUALITY, exif=exif)
