"""The names of images that are generated, and writing them. No file that is there is ever replaced."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.generation.parameters import PARAMETERS
from library.inference.images import save_png, save_with_comment
from library.runtime.durable import LONGEST_NAME, fitting
from library.runtime.files import reason
from library.runtime.paths import unwritable

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_NUMBERED = re.compile(r"im_\d?(\d{6})\.\w+")


@dataclass
class Names:
    """Gives names in a folder, each once, and none that is taken."""

    folder: Path
    ending: str  # with the dot, where a name does not bring its own
    moment: str  # date and time at which the run began
    _given: set[str] = field(default_factory=set)
    _next: int | None = None

    def timed(self, number: int, seed: int | None, stage: str = "") -> Path:
        """``im_<moment>_<stage><number>_<seed>``; the stage is 0 or 1 where images are drawn twice."""
        return self._free(f"im_{self.moment}_{stage}{number:03d}_{seed}", self.ending)

    def sequential(self, number: int, stage: str = "") -> Path:
        """``im_<stage><number>``, going on after the largest number in the folder. Args: number: from 0 on."""
        if self._next is None:
            found = map(_NUMBERED.fullmatch, os.listdir(self.folder) if self.folder.is_dir() else ())
            self._next = 1 + max((int(match[1]) for match in found if match), default=0)
        return self._free(f"im_{stage}{self._next + number:06d}", self.ending)

    def called(self, name: str) -> Path:
        """The name, with the ending that it has or the folder's; with a number where it is taken."""
        suffix = Path(name).suffix
        if suffix.lower() in ENDINGS:
            return self._free(name[: -len(suffix)], suffix.lower())
        return self._free(name, self.ending)

    def _free(self, stem: str, ending: str) -> Path:
        number = 1
        while True:
            more = "" if number == 1 else f"_{number}"
            path = self.folder / fitting(stem, more + ending)
            if path.name not in self._given and not os.path.lexists(path):
                self._given.add(path.name)
                return path
            number += 1


def require_folder(folder: Path, option: str) -> None:
    """Raises: UserError: images cannot be written to the folder that an option names; it need not be there yet."""
    why = unwritable(folder)
    if why:
        raise UserError(f"{option}: {why}")


def name_problem(name: str) -> str | None:
    """Why a file cannot have this name; None: it can."""
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        return f"must be the name of a file, without folders, got {name!r}"
    if "\0" in name or len(name.encode("utf-8", "surrogatepass")) > LONGEST_NAME:
        return "is no name that a file can have"
    return None


def write(image: Image, path: Path, texts: dict[str, str]) -> None:
    """Writes an image with what it says about itself. Raises: UserError: it cannot be written."""
    try:
        if path.suffix == ".png":
            save_png(image, path, texts)
        else:
            save_with_comment(image, path, texts[PARAMETERS])
    except OSError as error:
        raise UserError(f"{path}: cannot write the image ({reason(error)})") from error
