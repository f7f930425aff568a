"""Measures how well the tiny model follows prompts, and draws its sample sheet.

    python examples/tiny_model/measure.py --count 512 --sheet docs/images/tiny_model.png

Images are generated from captions of random scenes and read back by `images.read`, which is plain geometry.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from random import Random

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import images as pic
import torch
from PIL import Image

from library import cli
from library.inference.generate import generate
from library.inference.prompts import SamplePrompt

MODEL = HERE / "tiny-sd.safetensors"


def load(model: Path):
    """The family and the models of a Stable Diffusion 1.x file, as the training scripts load them."""
    return cli.load_family("sd", ["--pretrained_model_name_or_path", str(model)])


def sample(family, models, texts: list[str], first_seed: int, steps: int, scale: float) -> list[Image.Image]:
    prompts = [
        SamplePrompt(
            prompt=text,
            negative_prompt="",
            width=pic.SIZE,
            height=pic.SIZE,
            seed=first_seed + i,
            steps=steps,
            scale=scale,
            sampler="ddim",
        )
        for i, text in enumerate(texts)
    ]
    return generate(family, models, prompts, "cpu", batch_size=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--scale", type=float, default=5.0)
    parser.add_argument("--sheet", type=Path, help="write the first 48 images to this file")
    args = parser.parse_args()
    rng = Random(20261120)  # scenes the training did not use
    scenes = [pic.random_scene(rng) for _ in range(args.count)]
    texts = [pic.full_caption(scene) for scene in scenes]
    family, models = load(args.model)
    images = sample(family, models, texts, 1000, args.steps, args.scale)
    readings = [pic.read(image) for image in images]
    right = {
        "colour": sum(r.color == s.color for r, s in zip(readings, scenes, strict=True)),
        "shape": sum(r.shape == s.shape for r, s in zip(readings, scenes, strict=True)),
        "background": sum(pic.read_background(i) == s.background for i, s in zip(images, scenes, strict=True)),
    }
    for name, count in right.items():
        print(f"{name}: {count} of {args.count} ({100 * count / args.count:.1f}%)")
    if args.sheet:
        pic.sheet(images[:48], columns=12).save(args.sheet)
        for text in texts[:48]:
            print(f"  {text}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
