"""Texts on images, in any language: faces, line breaks, widths in pixels.

Texts are set in the first of `_FACES` that is installed, and each character that it lacks in the next one that has it.
Pillow's own face comes last, which knows little beyond ASCII. A character that no face has becomes an empty box.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import cache

from PIL import ImageDraw, ImageFont

TEXT = 12  # height of letters in pixels, where nothing else is said

# Found by file name in the system's own folders. Faces for many alphabets first, then Chinese, Japanese and Korean.
_FACES = (
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "segoeui.ttf",
    "Arial Unicode.ttf",
    "Arial.ttf",
    "arial.ttf",
    "LiberationSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKjp-Regular.otf",
    "NotoSansJP-Regular.otf",
    "YuGothM.ttc",
    "meiryo.ttc",
    "msgothic.ttc",
    "msyh.ttc",
    "malgun.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "AppleSDGothicNeo.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "ipag.ttf",
    "seguisym.ttf",
)
_OWN_FACE = ""  # Pillow's


def wrap(text: str, width: int, most: int) -> list[str]:
    """Lines at most `width` pixels wide, and at most `most` of them, the last one cut where there would be more."""
    lines: list[str] = []
    for word in text.split():
        if lines and length(f"{lines[-1]} {word}", TEXT) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append("")
            for char in word:  # one line, or several where the language has no spaces or the word is very long
                if lines[-1] and length(lines[-1] + char, TEXT) > width:
                    lines.append("")
                lines[-1] += char
        if len(lines) > most:
            return [*lines[: most - 1], shorten(f"{lines[most - 1]} {lines[most]}", width)]
    return lines


def shorten(text: str, width: int, front: float = 1.0) -> str:
    """The text, or what fits of it with an ellipsis; `front` is the share that is kept of the beginning."""
    kept = len(text)
    short = text
    while length(short, TEXT) > width and kept > 1:
        kept -= 1
        head = max(1, round(kept * front))
        short = f"{text[:head].rstrip()}…{text[len(text) - (kept - head) :]}"
    return short


def step(size: int) -> int:
    """The distance from line to line in pixels."""
    return round(size * 1.35)


def length(text: str, size: int) -> float:
    return sum(_typeface(face, size).getlength(run) for face, run in _runs(text))


def write(pen: ImageDraw.ImageDraw, left: float, top: int, text: str, size: int, colour: str) -> None:
    for face, run in _runs(text):
        font = _typeface(face, size)
        pen.text((left, top + size), run, fill=colour, font=font, anchor="ls")  # faces meet at the base line
        left += font.getlength(run)


def _runs(text: str) -> list[tuple[str, str]]:
    """(face, part of the text) one after the other. What has no look of its own goes with what stands before it."""
    runs: list[tuple[str, str]] = []
    for char in text:
        belongs = runs and (char.isspace() or unicodedata.category(char)[0] in "MC")
        face = runs[-1][0] if belongs else _face_of(char)
        if face is None:  # an empty box, from the first face that is installed
            face = next(one for one in (*_FACES, _OWN_FACE) if _typeface(one, TEXT) is not None)
        if runs and runs[-1][0] == face:
            runs[-1] = (face, runs[-1][1] + char)
        else:
            runs.append((face, char))
    return runs


def without_face(texts: Iterable[str]) -> set[str]:
    characters = {char for text in texts for char in text}
    return {c for c in characters if unicodedata.category(c)[0] not in "MCZ" and _face_of(c) is None}


@cache
def _face_of(char: str) -> str | None:
    """The first face that has the character."""
    for face in (*_FACES, _OWN_FACE):
        font = _typeface(face, TEXT)
        if font is not None and _look(font, char) != _look(font, "\U0010ffff"):  # never a character, so drawn as a box
            return face
    return None


def _look(font: ImageFont.FreeTypeFont, char: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(char)
    return mask.size, bytes(mask)


@cache
def _typeface(face: str, size: int) -> ImageFont.FreeTypeFont | None:
    """None where the face is not installed."""
    try:
        return ImageFont.load_default(size) if face == _OWN_FACE else ImageFont.truetype(face, size)
    except OSError:
        return None
