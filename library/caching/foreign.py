"""Whether cache files that say nothing of their origin, as those of other trainers do, may be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from library.caching.entry import CacheRequest, times
from library.types import TextLayout

SIZE, CROP = "original_size", "crop_ltrb"  # arrays that all trainers write beside latents
OLDEST = "arr_0"  # what the first trainers called latents; mirrored ones had a file of their own

_CROP_TOLERANCE = 1.0  # pixels; trainers have rounded differently

Stamp = Callable[[Path], "tuple[int, int] | None"]  # (bytes, modification time in ns) of a file


def latents_reason(
    file: Path, contents: Mapping[str, Any], suffix: str, request: CacheRequest, stamp: Stamp
) -> str | None:
    """Why latents without a note cannot be used. `contents`: see `store.summary`; `suffix`: ends the arrays' names."""
    if reason := origin_reason(file, contents, suffix, request, stamp):
        return reason
    crop = _values(contents, CROP + suffix, request.crop_ltrb)
    near = [abs(a - b) <= _CROP_TOLERANCE for a, b in zip(crop, request.crop_ltrb, strict=False)]
    return None if len(near) == 4 and all(near) else "made with another crop"


def origin_reason(
    file: Path, contents: Mapping[str, Any], suffix: str, request: CacheRequest, stamp: Stamp
) -> str | None:
    """Why latents without a note may not be this image's, in whichever bucket."""
    if request.shared_stem:
        return "it does not say which of the images of this name it was made from"
    size = _values(contents, SIZE + suffix, request.size)
    if size != list(request.size):
        turned = size == list(request.size[::-1])
        return "made from the image before it was turned" if turned else f"made from an image of {times(size)}"
    return age_reason(file, request, stamp)


def age_reason(file: Path, request: CacheRequest, stamp: Stamp) -> str | None:
    """A file that is older than its image was made from another one."""
    made, taken = stamp(file), stamp(request.image) if request.present else None
    return "older than the image" if made and taken and made[1] < taken[1] else None


def text_reason(file: Path, layout: TextLayout, source: Path, *, changed: bool) -> str | None:
    """Why text-encoder outputs without a note cannot be used: only time can say whether their caption has changed.

    Args:
        source: the caption file, or the image.
        changed: the caption is not what the caption file says, e.g. it has a prefix.
    """
    if layout.reject_foreign:
        return layout.reject_foreign
    if changed:
        return "it does not record its caption, and what earlier trainers put there is the caption file as it is"
    try:
        older = file.stat().st_mtime_ns < source.stat().st_mtime_ns
    except OSError as error:
        return f"it does not record its caption, and cannot be compared with {source.name} ({error.strerror or error})"
    return f"it does not record its caption, and is older than {source.name}" if older else None


def _values(contents: Mapping[str, Any], name: str, default: Sequence[float]) -> list[float]:
    """The numbers of a small array, `default` where there is none; empty where it is not of the length of `default`."""
    shape = contents["arrays"].get(name, [[len(default)]])[0]
    return contents["values"].get(name, list(default)) if shape == [len(default)] else []
