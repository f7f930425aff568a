"""Measures what a network from train_leco.py does to the tiny model: a colour that is erased, or a slider of size.

    python examples/tiny_model/measure_edit.py --network leco_out/no_red.safetensors --color red
    python examples/tiny_model/measure_edit.py --network leco_out/size.safetensors --multipliers -2 -1 0 1 2

Images are made from captions and read back by `images.read`, which is plain geometry.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import images as pic
import numpy as np
import torch
from measure import MODEL, sample
from PIL import Image

from library import cli
from library.methods.network import NetworkMethod

SHAPES, PLACES = ("circle", "star", "heart", "square"), ("white", "black", "gray")


def attached(network: Path):
    """Family and models with the network on them, and a function that sets its strength."""
    options = [f"--pretrained_model_name_or_path={MODEL}", "--network_module=networks.lora", "--dim_from_weights"]
    options += [f"--network_weights={network}", "--network_train_unet_only", "--learning_rate=1"]
    family, models = cli.load_family("sd", options)
    method = NetworkMethod(family.opts)
    method.attach(family, models)
    method.trainable().eval()
    return family, models, method.trainable().set_multiplier


def color_texts(colors: list[str], count: int) -> list[tuple[str, str]]:
    """(colour, caption), `count` of them over colours, shapes and backgrounds in turn."""
    found = []
    for number in range(count):
        color, shape = colors[number % len(colors)], SHAPES[number // len(colors) % len(SHAPES)]
        place = PLACES[number % len(PLACES)]
        article = "an" if color[0] in "aeiou" else "a"
        found.append((color, f"{article} {color} {shape} on a {place} background"))
    return found


def covered(image: Image.Image) -> float:
    """The share of the image that differs clearly from its border."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return float((np.linalg.norm(pixels - np.median(border, axis=0), axis=-1) > 60).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", type=Path, required=True)
    parser.add_argument("--color", choices=list(pic.COLORS), help="measure this colour and the others")
    parser.add_argument("--multipliers", type=float, nargs="*", default=[0.0, 1.0], help="strengths of the network")
    parser.add_argument("--text", default="a circle on a white background", help="caption whose figure is measured")
    parser.add_argument("--count", type=int, default=24, help="images of each kind")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--scale", type=float, default=5.0)
    parser.add_argument("--sheet", type=Path, help="write the first eight images of each kind to this file")
    args = parser.parse_args()
    family, models, set_multiplier = attached(args.network)
    rows = []

    def made(texts: list[str]) -> list[Image.Image]:
        images = sample(family, models, texts, 1000, args.steps, args.scale)
        rows.append(images[:8])
        return images

    for multiplier in args.multipliers:
        set_multiplier(multiplier)
        if args.color is None:
            images = made([args.text] * args.count)
            shares = [covered(image) for image in images]
            print(
                f"at {multiplier:g}: the figure covers {100 * sum(shares) / len(shares):.1f}% of the image", flush=True
            )
            continue
        others = [color for color in pic.COLORS if color != args.color]
        for what, colors in ((args.color, [args.color]), ("other colours", others)):
            texts = color_texts(colors, args.count)
            images = made([text for _, text in texts])
            right = sum(pic.read(image).color == color for image, (color, _) in zip(images, texts, strict=True))
            print(f"at {multiplier:g}: {what}: {right} of {args.count} have the colour of their caption", flush=True)
    if args.sheet:
        pic.sheet([image for row in rows for image in row], columns=8).save(args.sheet)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
