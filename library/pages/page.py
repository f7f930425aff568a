"""HTML pages that need nothing beside them: a template, styles and scripts of this folder, and data as JSON.

Everything that a page shows is in its data, and scripts put it there as text, never as markup: nothing has to be
escaped but the JSON itself, and a page can be read back.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from library.runtime.documents import read_text

LONGEST_SIDE = 512  # pixels of an embedded image
LARGEST_PAGE = 200 << 20  # bytes of a page that is read back; those written here are far smaller

_FOLDER = Path(__file__).parent
_INCLUDE = re.compile(r"@include ([a-z]+\.[a-z]+)@")
_START, _END = '<script type="application/json" id="data">', "</script>"
_TINY = 128  # pixels
_MARKUP = ("<", ">", "&")  # could end the element or begin a comment in it; in JSON they stand in texts only


def render(template: str, title: str, data: Any) -> str:
    """A page. Args: template: a file of this folder; data: what JSON can hold, without infinite numbers."""
    text = _INCLUDE.sub(lambda one: _part(one[1]), _part(template))
    head, found, rest = text.partition("@title@")
    assert found, template
    body, found, end = rest.partition("@data@")
    assert found, template
    return "".join((head, html.escape(title), body, _START, as_json(data), _END, end))


def as_json(data: Any) -> str:
    """JSON in ASCII that may stand inside a script element. Raises: ValueError: a number is infinite or NaN."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for sign in _MARKUP:
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def read_data(path: Path) -> Any:
    """The data of a page that `render` made. Raises: ValueError: it is no such page. UserError: it cannot be read."""
    _, found, rest = read_text(path, "the page", limit=LARGEST_PAGE).partition(_START)
    data, ended, _ = rest.partition(_END)
    if not (found and ended):
        raise ValueError(f"{path} holds no data of a page")
    return json.loads(data)


def data_url(image: Image.Image, longest: int = LONGEST_SIDE, quality: int = 85) -> str:
    """The image as WebP in a URL, at most `longest` pixels on a side; tiny ones without loss."""
    small = image.convert("RGBA" if "A" in image.getbands() else "RGB")
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=quality, lossless=max(small.size) <= _TINY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _part(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
