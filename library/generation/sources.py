"""The images that drawing begins with: which of them an image begins with, and what they say of themselves."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.generation.parameters import PARAMETERS, said_in
from library.inference.images import EXIF, USER_COMMENT
from library.inference.prompts import SourceImage
from library.preparation.common.images import find_images

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.options.base import Options
    from library.options.inference_images import SourceOptions
    from library.types import FamilyTraits, Size

_STEP = 32  # pixels; sides of images that are drawn at the size of their source are multiples of it
# Fields of a prompt by their keys in files of ours, and what turns their texts into values.
_FIELDS: dict[str, Callable[[str], Any]] = {
    "prompt": str, "negative-prompt": str, "sampler": str, "seed": int, "steps": int, "scale": float,
    "negative-scale": float, "guidance": float, "flow-shift": float,
}  # fmt: skip
_CODES = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "ascii"}  # of a comment, by how it begins


@dataclass(frozen=True)
class Sources:
    """Images to begin with, and masks, each taken in turn."""

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    pinned: bool = False  # see `SourceImage`

    @classmethod
    def of(cls, options: SourceOptions, *, pinned: bool = False) -> Sources | None:
        """Those that the options name; None: there are none. Raises: UserError: they are not there."""
        if not options.image_path:
            return None
        masks = files_of("--mask_path", options.mask_path) if options.mask_path else ()
        return cls(files_of("--image_path", options.image_path), masks, pinned)

    def at(self, number: int, where: str) -> SourceImage:
        """That of the image of this number; of a prompt that an image gave, that image. Args: where: of the prompt."""
        own = (place for place, path in enumerate(self.images) if str(path) == where)
        number = next(own, number)
        mask = self.masks[number % len(self.masks)] if self.masks else None
        return SourceImage(self.images[number % len(self.images)], mask, pinned=self.pinned)


def size_of(source: SourceImage, where: str) -> Size:
    """Width and height of the source, floored to what every model takes. Raises: UserError: it cannot be read."""
    from library.types import Size

    size = require_image(source.path, where)
    return Size(*(max(_STEP, side // _STEP * _STEP) for side in size))


def require_image(path: Path, where: str) -> Size:
    """The size of an image. Raises: UserError: it cannot be read. Args: where: of the prompt."""
    from library.data.sample import images

    try:
        return images.image_size(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {path}: the image cannot be read ({images.reason(error)})") from None


def said_by(path: Path) -> dict[str, Any]:
    """The fields of a prompt that an image's own texts give: of this program, else of web interfaces.

    Raises: UserError: it cannot be read, or says nothing.
    """
    from library.data.sample import images

    try:
        texts = images.use_image(path, lambda image, _file, _length: _texts_in(image))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the image cannot be read ({images.reason(error)})") from None
    if "prompt" not in texts and PARAMETERS not in texts:
        raise UserError(f"{path}: the image does not say which prompt it was made with; give one with --prompt")
    found: dict[str, Any] = {}
    if "prompt" in texts:
        for key, kind in _FIELDS.items():
            try:
                found[key.replace("-", "_")] = kind(texts[key])
            except (KeyError, ValueError):
                continue
        return found
    return said_in(texts[PARAMETERS], str(path))


def _texts_in(image: Image) -> dict[str, str]:
    """The texts of an image's file by their keys; a comment, which is all that some formats have, as parameters."""
    texts = {key: value for key, value in image.info.items() if isinstance(value, str)}
    comment = image.getexif().get_ifd(EXIF).get(USER_COMMENT)
    if isinstance(comment, bytes) and comment[:8] in _CODES and PARAMETERS not in texts:
        texts[PARAMETERS] = comment[8:].decode(_CODES[comment[:8]], "replace")
    return texts


def images_seen(opts: Options, traits: FamilyTraits) -> tuple[Path, ...] | None:
    """The images that CLIP sees, taken in turn; (): those that drawing begins with; None: it sees none.

    Raises: UserError: they are not there.
    """
    if opts.source.clip_vision_strength is None or not traits.pooled_by_image:
        return None
    taken = opts.control.nets[1] and opts.source.image_path  # the guides are those of ControlNets
    guides = () if taken else opts.source.guide_image_path or ()
    return tuple(path for name in guides for path in files_of("--guide_image_path", name))


def files_of(option: str, path: str) -> tuple[Path, ...]:
    """The file that an option names, or the images of the folder. Raises: UserError: it is not there, or empty."""
    if os.path.isdir(path):
        return tuple(find_images(Path(path), recursive=False))
    if not os.path.isfile(path):
        raise UserError(f"{option}: there is no file or folder {path!r}")
    return (Path(path),)
