"""Caption and tag files as their writers left them: UTF-8, UTF-16, or Japanese text of older Windows programs."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from library.data.sample.captions import LARGEST_CAPTION
from library.data.scan.folders import is_image
from library.errors import UserError
from library.runtime.durable import discard_once, replacing
from library.runtime.files import read_bytes, reason

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_KANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa]")
_HALF_WIDTH = re.compile(r"[\uff61-\uff9f]")  # what the bytes of most other encodings would be


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Where no mark says the encoding, it is UTF-8; else UTF-16 if its zero bytes show it; else Shift-JIS if it has kana
    and nothing that other encodings look like. Anything else would be a guess.

    Raises: UserError: the file cannot be read, or its encoding is not certain.
    """
    try:
        content = read_bytes(path, LARGEST_CAPTION)
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read ({reason(error)})") from None
    text = _decode(content)
    if text is None:
        raise UserError(f"{path}: neither UTF-8 nor another encoding for certain; save the file as UTF-8")
    return text


def read_lines(path: Path) -> str:
    """The lines of a file that are not blank, without the space around them, joined by newlines. Raises: UserError."""
    lines = (line.strip() for line in re.split(r"\r\n|\r|\n", read_text(path)))
    return "\n".join(line for line in lines if line)


def require_text_ending(extension: str) -> None:
    """Raises: UserError: texts with this ending would take the place of images."""
    if is_image(f"a{extension}"):
        raise UserError(f"--caption_extension: files ending in {extension} are images; give another, such as .txt")


def write_text(path: Path, text: str) -> None:
    """Writes a text file as UTF-8, or leaves an earlier one as it was. Raises: UserError: it cannot be written."""
    discard_once(path.parent, path.suffix)
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(text.encode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def _decode(content: bytes) -> str | None:
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return _as(encoding, content.removeprefix(mark))
    if b"\0" in content:
        # Letters of Latin scripts have a zero byte, before or after the other, and no text has whole zeros.
        first, second = 0 in content[0::2], 0 in content[1::2]
        if first == second:
            return None
        return _as("utf-16-be" if first else "utf-16-le", content)
    text = _as("utf-8", content)
    if text is None:
        text = _as("cp932", content)
        if text is None or not _KANA.search(text) or _HALF_WIDTH.search(text):
            return None
    return text


def _as(encoding: str, content: bytes) -> str | None:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        return None
