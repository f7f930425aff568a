"""Measures how well images of the tiny model follow edges, without a ControlNet and with one.

    python examples/tiny_model/measure_edges.py --controlnet pairs/out/edges.safetensors --sheet edges.png

The prompts say colour, shape and background of scenes that no training used; size and place are in the edges alone. An
image agrees with its edges as far as edges found in it lie on them and the other way round, to within two pixels.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import cv2
import images as pic
import numpy as np
import torch
from measure import MODEL, load
from PIL import Image

from library.inference.generate import generate
from library.inference.prompts import ControlImage, SamplePrompt
from library.preparation.images.edges import canny

NEAR = np.ones((5, 5), np.uint8)  # two pixels to each side


def edges_of(image: Image.Image) -> np.ndarray:
    """White on black, (H, W) uint8; with the thresholds of tools/canny.py."""
    return canny(np.asarray(image), 32, 224)


def agreement(image: Image.Image, wanted: np.ndarray) -> float:
    """The harmonic mean of the shares of edges that lie near edges of the other kind (F1), 0 to 1."""
    found = edges_of(image)
    if not found.any() or not wanted.any():
        return 0.0
    precision = (cv2.dilate(wanted, NEAR)[found > 0] > 0).mean()
    recall = (cv2.dilate(found, NEAR)[wanted > 0] > 0).mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def prompts_for(scenes: list[tuple[pic.Scene, np.ndarray]], steps: int, scale: float) -> list[SamplePrompt]:
    prompts = []
    for number, (scene, edges) in enumerate(scenes):
        text = f"a {scene.color} {scene.shape} on a {scene.background} background"
        control = ControlImage(Path(f"scene {number}"), np.repeat(edges[..., None], 3, axis=2))
        side = pic.SIZE
        prompts.append(SamplePrompt(text, "", side, side, 3000 + number, steps, scale, "ddim", control=control))
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--controlnet", type=Path, required=True)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=5.0)
    parser.add_argument("--sheet", type=Path, help="write edges, images without and images with them to this file")
    args = parser.parse_args()
    rng, scenes = Random(20261130), []  # scenes the training did not use
    for _ in range(args.count):
        scene = replace(pic.random_scene(rng), texture="plain")
        scenes.append((scene, edges_of(pic.draw(scene, rng))))
    family, models = load(args.model)
    net = family.control.load(models, str(args.controlnet))
    prompts, shown = prompts_for(scenes, args.steps, args.scale), []
    for name, denoise in (("without", None), ("with", partial(family.control.predict, models, net))):
        made = generate(family, models, prompts, "cpu", batch_size=32, denoise=denoise)
        scores = [agreement(image, edges) for image, (_, edges) in zip(made, scenes, strict=True)]
        shapes = sum(pic.read(image).shape == scene.shape for image, (scene, _) in zip(made, scenes, strict=True))
        print(f"{name} the ControlNet: edges agree to {np.mean(scores):.2f}; {shapes} of {args.count} shapes are right")
        shown.append(made)
    if args.sheet:
        rows = [[Image.fromarray(edges).convert("RGB") for _, edges in scenes], *shown]
        pic.sheet([image for row in rows for image in row[:12]], columns=12).save(args.sheet)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
