"""Measures how well images of the tiny model follow edges, without a ControlNet and with one.

    python examples/tiny_model/measure_edges.py --controlnet pairs/out/edges.safetensors --sheet edges.png

The prompts say colour, shape and background of scenes that no training used; size and place are in the edges alone. An
image agrees with its edges as far as edges found in it lie on them and the other way round, to within two pixels. Its
figure overlaps with that of the scene by the area of both together (intersection over union). What the VAE makes of the
scenes themselves says how well any image of this model can do.
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
from library.inference.images import to_images
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


def overlap(image: Image.Image, scene: Image.Image) -> float:
    """Intersection over union of the figures in two images, 0 to 1."""
    found, wanted = pic.figure(image), pic.figure(scene)
    return float((found & wanted).sum() / max((found | wanted).sum(), 1))


def prompts_for(
    scenes: list[tuple[pic.Scene, Image.Image]], edges: list[np.ndarray], steps: int, scale: float
) -> list[SamplePrompt]:
    prompts = []
    for number, ((scene, _), wanted) in enumerate(zip(scenes, edges, strict=True)):
        text = f"a {scene.color} {scene.shape} on a {scene.background} background"
        control = ControlImage(Path(f"scene {number}"), np.repeat(wanted[..., None], 3, axis=2))
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
    scenes = drawn_scenes(args.count)
    edges = [edges_of(image) for _, image in scenes]
    family, models = load(args.model)
    net = family.control.load(models, str(args.controlnet))
    prompts = prompts_for(scenes, edges, args.steps, args.scale)
    made = {"the VAE's copies": copies(family, models, [image for _, image in scenes])}
    for name, denoise in (("without", None), ("with", partial(family.control.predict, models, net))):
        images = generate(family, models, prompts, "cpu", batch_size=32, denoise=denoise)
        made[f"{name} the ControlNet"] = images
    for name, images in made.items():
        report(name, images, scenes, edges)
    if args.sheet:
        rows = [[Image.fromarray(image).convert("RGB") for image in edges], *list(made.values())[1:]]
        pic.sheet([image for row in rows for image in row[:12]], columns=12).save(args.sheet)


def drawn_scenes(count: int) -> list[tuple[pic.Scene, Image.Image]]:
    """Scenes that the training did not use, and their images."""
    rng, scenes = Random(20261130), []
    for _ in range(count):
        scene = replace(pic.random_scene(rng), texture="plain")
        scenes.append((scene, pic.draw(scene, rng)))
    return scenes


def copies(family, models, images: list[Image.Image]) -> list[Image.Image]:
    """The images through the VAE, there and back."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
    latents = family.latents.encode(models, pixels, torch.Generator().manual_seed(1))
    return to_images(family.latents.decode(models, family.latents.scale(latents)))


def report(name: str, images: list[Image.Image], scenes: list[tuple[pic.Scene, Image.Image]], edges: list) -> None:
    edge_score = np.mean([agreement(image, wanted) for image, wanted in zip(images, edges, strict=True)])
    figure_score = np.mean([overlap(image, wanted) for image, (_, wanted) in zip(images, scenes, strict=True)])
    shapes = sum(pic.read(image).shape == scene.shape for image, (scene, _) in zip(images, scenes, strict=True))
    shown = f"edges agree to {edge_score:.2f}; figures overlap to {figure_score:.2f}"
    print(f"{name}: {shown}; {shapes} of {len(images)} shapes are right")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
