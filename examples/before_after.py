"""Puts sample images of a run side by side: the first ones above, the last ones below, under their prompts.

python examples/before_after.py demo_out/sample examples/concept demo_out/before_after.png
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, HEAD, LABEL = 160, 8, 58, 92


def first_and_last(folder: Path) -> list[tuple[Path, Path]]:
    """Each prompt's first and last sampled image; names end in `_<step>_<prompt>_<time>_<seed>.png`."""
    by_prompt: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.png")):
        prompt = path.stem.split("_")[-3]
        by_prompt.setdefault(prompt, []).append(path)
    return [(paths[0], paths[-1]) for _, paths in sorted(by_prompt.items())]


def paste(sheet: Image.Image, image: Image.Image, place: tuple[int, int]) -> None:
    sheet.paste(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), place)


def make_sheet(samples: Path, concept: Path) -> Image.Image:
    pairs = first_and_last(samples)
    training = sorted(concept.glob("*/*.png"))[: len(pairs)]
    width = LABEL + len(pairs) * (SIDE + GAP)
    sheet = Image.new("RGB", (width, HEAD + 3 * (SIDE + GAP) + 40), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    rows = [HEAD + row * (SIDE + GAP) for row in range(2)]
    training_row = rows[1] + SIDE + 40
    for label, y in (
        ("without\nthe LoRA", rows[0]),
        ("with\nthe LoRA", rows[1]),
        ("images it\nlearned from", training_row),
    ):
        pen.multiline_text((8, y + SIDE // 2 - 16), label, fill="black", font=font)
    for column, (before, after) in enumerate(pairs):
        x = LABEL + column * (SIDE + GAP)
        with Image.open(before) as image:
            prompt = image.info.get("prompt", "")
            paste(sheet, image, (x, rows[0]))
        with Image.open(after) as image:
            paste(sheet, image, (x, rows[1]))
        pen.multiline_text((x, 6), "\n".join(textwrap.wrap(prompt, 24)), fill="black", font=font)
    for column, path in enumerate(training):
        with Image.open(path) as image:
            paste(sheet, image, (LABEL + column * (SIDE + GAP), training_row))
    return sheet


def main() -> None:
    samples, concept, target = map(Path, sys.argv[1:4])
    make_sheet(samples, concept).save(target)


if __name__ == "__main__":
    main()
