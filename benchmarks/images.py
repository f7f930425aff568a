"""Images for the measurements: smooth random fields, every one different, and old enough to be kept in an index."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Size = tuple[int, int]

_WORDS = ["red", "green", "blue", "house", "tree", "river", "hill", "cloud", "cat", "dog", "chair", "window", "boat"]
_AGE = 3600  # seconds; facts about files younger than the clock of a file system can tell are not kept


def write_images(
    folder: Path, count: int, size_of: Callable[[int], Size], kinds: Sequence[str] = ("png", "jpg")
) -> None:
    """Fills a folder, or leaves it as it is where it has been filled like this before. Half have captions."""
    done = folder / ".written"
    note = f"{count} {[size_of(number) for number in range(min(count, 50))]} {kinds}"
    if done.exists() and done.read_text() == note:
        return
    folder.mkdir(parents=True, exist_ok=True)
    words = random.Random(0)
    fields = np.random.default_rng(0)
    old = time.time() - _AGE
    for number in range(count):
        size = size_of(number)
        grid = fields.integers(0, 256, (max(2, size[1] // 16), max(2, size[0] // 16), 3), np.uint8)
        image = Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)
        path = folder / f"{number:07d}.{kinds[number % len(kinds)]}"
        if path.suffix == ".png":
            image = image.quantize(16, method=Image.Quantize.FASTOCTREE)
        image.save(path, quality=85, compress_level=1)
        os.utime(path, (old, old))
        if words.random() < 0.5:
            caption = path.with_suffix(".txt")
            caption.write_text(", ".join(words.choices(_WORDS, k=6)), encoding="utf-8")
            os.utime(caption, (old, old))
    done.write_text(note)
