"""Measures how well a model fills a part of an image in the colour that the prompt says, and keeps to the rest.

    python examples/tiny_model/measure_inpainting.py --models inpaint_out/tiny-inpaint.safetensors --sheet filled.png

The figure of each image is masked out, with a margin. The prompt names another colour and the shape, and not the
background, which is to be seen from what is left. Each model begins with the same noise. The first one is the bundled
model, given inputs for a mask that do nothing yet. Images are read back by `images.read`, which is plain geometry.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import images as pic
import numpy as np
import torch
from measure import MODEL
from PIL import Image

from library import cli
from library.inference.generate import generate
from library.inference.prompts import SamplePrompt, SourceImage

MARGIN = 4  # pixels around the figure


@dataclass(frozen=True)
class Task:
    """An image whose figure is masked out, and what is to be there."""

    scene: pic.Scene  # with the colour that is asked for
    image: np.ndarray  # (64, 64, 3)
    mask: np.ndarray  # bool (64, 64)

    def prompt(self, number: int, steps: int, scale: float) -> SamplePrompt:
        source = SourceImage(Path("scene"), pixels=self.image, mask_pixels=self.mask.astype(np.uint8) * 255)
        text = f"{'an' if self.scene.color[0] in 'aeiou' else 'a'} {self.scene.color} {self.scene.shape}"
        seed = 1000 + number
        return SamplePrompt(text, "", pic.SIZE, pic.SIZE, seed, steps, scale, "ddim", source=source, strength=1.0)

    def masked(self) -> Image.Image:
        return Image.fromarray(np.where(self.mask[..., None], np.uint8(128), self.image))


def tasks(count: int) -> list[Task]:
    rng, found = Random(20261129), []  # scenes that no training has used
    for number in range(count):
        scene = replace(pic.random_scene(rng), texture="plain", size=("medium", "large")[number % 2])
        image = pic.draw(scene, rng)
        ys, xs = np.nonzero(pic.figure(image))
        mask = np.zeros((pic.SIZE, pic.SIZE), bool)
        top, left = max(0, ys.min() - MARGIN), max(0, xs.min() - MARGIN)
        mask[top : ys.max() + MARGIN + 1, left : xs.max() + MARGIN + 1] = True
        color = rng.choice([name for name in pic.COLORS if name != scene.color])
        found.append(Task(replace(scene, color=color), np.asarray(image), mask))
    return found


def judged(task: Task, image: Image.Image) -> tuple[bool, bool, float]:
    """Whether the figure has the colour that was asked for; whether the background inside the mask is that outside of
    it; and how far what was to be kept has changed, the mean over pixels and channels, 0..255."""
    filled = np.where(task.mask[..., None], np.asarray(image), task.image)  # as programs put it back
    border = np.median(task.image[~task.mask], axis=0)
    rim = task.mask & ~shrunk(task.mask, 2)
    background = np.linalg.norm(np.median(np.asarray(image)[rim], axis=0) - border) < 40
    kept = np.abs(np.asarray(image)[~task.mask].astype(float) - task.image[~task.mask])
    return pic.read(Image.fromarray(filled)).color == task.scene.color, bool(background), float(kept.mean())


def shrunk(mask: np.ndarray, by: int) -> np.ndarray:
    """The mask without its outermost pixels; the image's edge is no edge of it."""
    padded = np.pad(mask, by, mode="edge")
    size = pic.SIZE
    shifts = [padded[y : y + size, x : x + size] for y in range(2 * by + 1) for x in range(2 * by + 1)]
    return np.logical_and.reduce(shifts)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="models for inpainting")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=4.0)
    parser.add_argument("--sheet", type=Path, help="write ten images, and how each model fills them, to this file")
    args = parser.parse_args()
    chosen = tasks(args.count)
    prompts = [task.prompt(number, args.steps, args.scale) for number, task in enumerate(chosen)]
    rows = [[Image.fromarray(task.image) for task in chosen[:10]], [task.masked() for task in chosen[:10]]]
    for model in (MODEL, *args.models):
        family, models = cli.load_family("sd", ["--pretrained_model_name_or_path", str(model), "--train_inpainting"])
        found = generate(family, models, prompts, "cpu", batch_size=32)
        rows.append(found[:10])
        colors, backgrounds, kept = zip(*map(judged, chosen, found), strict=True)
        print(
            f"{model.name}: {sum(colors)} of {len(found)} figures in the colour of the prompt, {sum(backgrounds)} on "
            f"the image's background; what was to be kept differs by {np.mean(kept):.1f} of 255",
            flush=True,
        )
    if args.sheet:
        pic.sheet([image for row in rows for image in row], columns=10).save(args.sheet)


if __name__ == "__main__":
    main()
