"""Draws the images the tiny model is trained on, and reads colour and shape back from any image.

Everything here is plain geometry: a scene is a record of attributes, `draw` turns it into an image, `caption` into
words, and `read` goes the other way without any learned part, so that it can judge what a model generated.

    python examples/tiny_model/images.py --preview scenes.png       # a sheet of random scenes
    python examples/tiny_model/images.py --concept examples/concept # the new concept that quickstart.py teaches
    python examples/tiny_model/images.py --scenes pairs/images      # images whose edges a ControlNet can learn from
    python examples/tiny_model/images.py --figures scenes/1_figure  # images to learn inpainting from
"""

from __future__ import annotations

import argparse
import colorsys
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels; the tiny model's native side
SUPERSAMPLE = 4  # drawn this much larger, then reduced, for smooth edges

COLORS = {
    "red": (225, 30, 35),
    "orange": (250, 135, 20),
    "yellow": (245, 225, 40),
    "green": (35, 160, 60),
    "cyan": (40, 205, 225),
    "blue": (35, 75, 220),
    "purple": (140, 50, 200),
    "pink": (250, 110, 190),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (12, 12, 14),
    "gray": (130, 130, 132),
    "beige": (226, 208, 176),
    "navy": (22, 30, 72),
    "brown": (98, 64, 40),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = {"small": 0.38, "medium": 0.55, "large": 0.74}  # of the image's side
POSITIONS = {
    "center": (0.5, 0.5),
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
    "top": (0.5, 0.0),
    "bottom": (0.5, 1.0),
    "top left": (0.0, 0.0),
    "top right": (1.0, 0.0),
    "bottom left": (0.0, 1.0),
    "bottom right": (1.0, 1.0),
}
CONCEPT_TOKEN, CONCEPT_CLASS = "sks", "flower"


@dataclass(frozen=True)
class Scene:
    """One image in words. `shape` may also be the concept's class, "flower", which has colours of its own."""

    shape: str
    color: str
    background: str
    size: str = "medium"
    position: str = "center"
    texture: str = "plain"


def random_scene(rng: Random) -> Scene:
    return Scene(
        shape=rng.choice(SHAPES),
        color=rng.choice(list(COLORS)),
        background=rng.choice(list(BACKGROUNDS)),
        size=rng.choice(list(SIZES)),
        position=rng.choice(list(POSITIONS)) if rng.random() < 0.6 else "center",
        texture="plain" if rng.random() < 0.6 else rng.choice(TEXTURES[1:]),
    )


def caption(scene: Scene, rng: Random) -> str:
    """A caption of `scene`, as a sentence or as tags; what is not the default is mostly, not always, said."""
    size = scene.size if rng.random() < (0.8 if scene.size != "medium" else 0.2) else ""
    texture = scene.texture if scene.texture != "plain" and rng.random() < 0.9 else ""
    position = scene.position if rng.random() < (0.8 if scene.position != "center" else 0.2) else ""
    background = scene.background if rng.random() < 0.9 else ""
    noun = " ".join(word for word in (size, texture, scene.color, scene.shape) if word)
    if rng.random() < 0.5:
        tags = [noun] if rng.random() < 0.5 else [f"{scene.color} {scene.shape}", texture, size]
        rest = [position, f"{background} background" if background else ""]
        rng.shuffle(rest)
        return ", ".join(tag for tag in tags + rest if tag)
    article = "an" if noun[0] in "aeiou" else "a"
    text = f"{article} {noun}" if rng.random() < 0.8 else noun
    if position:
        text += f" {'in' if position == 'center' else 'at'} the {position}"
    if background:
        text += f" on a {background} background"
    return text if rng.random() < 0.8 else f"a picture of {text}"


def full_caption(scene: Scene) -> str:
    """The caption that says everything about `scene`."""
    texture = "" if scene.texture == "plain" else f"{scene.texture} "
    place = "" if scene.position == "center" else f" at the {scene.position}"
    return f"a {scene.size} {texture}{scene.color} {scene.shape}{place} on a {scene.background} background"


# --- drawing ----------------------------------------------------------------------------------------------------------


def _regular(n: int, radii: Iterable[float], turn: float = -90.0) -> list[tuple[float, float]]:
    return [
        (0.5 + r * math.cos(math.radians(turn + 360 * i / n)), 0.5 + r * math.sin(math.radians(turn + 360 * i / n)))
        for i, r in zip(range(n), radii, strict=True)
    ]


def _heart() -> list[tuple[float, float]]:
    points = []
    for i in range(60):
        t = 2 * math.pi * i / 60
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((0.5 + x / 34, 0.46 - y / 34))
    return points


def shape_mask(shape: str, side: int) -> np.ndarray:
    """The shape filling a `side` x `side` square, as uint8 0/255, (side, side).

    Raises: KeyError: `shape` is not one of SHAPES or "flower".
    """
    image = Image.new("L", (side, side))
    pen = ImageDraw.Draw(image)

    def ellipse(cx: float, cy: float, r: float, fill: int = 255) -> None:
        pen.ellipse([(cx - r) * side, (cy - r) * side, (cx + r) * side - 1, (cy + r) * side - 1], fill=fill)

    def polygon(points: Iterable[tuple[float, float]]) -> None:
        pen.polygon([(x * side, y * side) for x, y in points], fill=255)

    if shape == "circle":
        ellipse(0.5, 0.5, 0.5)
    elif shape == "square":
        pen.rectangle([0.06 * side, 0.06 * side, 0.94 * side, 0.94 * side], fill=255)
    elif shape == "triangle":
        polygon([(0.5, 0.04), (0.98, 0.92), (0.02, 0.92)])
    elif shape == "star":
        polygon(_regular(10, (0.54 if i % 2 == 0 else 0.22 for i in range(10))))
    elif shape == "heart":
        polygon(_heart())
    elif shape == "cross":
        pen.rectangle([0.34 * side, 0.02 * side, 0.66 * side, 0.98 * side], fill=255)
        pen.rectangle([0.02 * side, 0.34 * side, 0.98 * side, 0.66 * side], fill=255)
    elif shape == "ring":
        ellipse(0.5, 0.5, 0.5)
        ellipse(0.5, 0.5, 0.27, fill=0)
    elif shape == "moon":
        ellipse(0.5, 0.5, 0.5)
        ellipse(0.74, 0.40, 0.40, fill=0)
    elif shape == CONCEPT_CLASS:
        for x, y in _regular(5, (0.30,) * 5):
            ellipse(x, y, 0.20)
        ellipse(0.5, 0.5, 0.20)
    else:
        raise KeyError(shape)
    return np.asarray(image)


def _texture_mask(texture: str, side: int, unit: float) -> np.ndarray:
    """Where the darker of the two tones goes, uint8 0/255, (side, side); `unit` is the pattern's period in pixels."""
    y, x = np.mgrid[0:side, 0:side] / unit
    if texture == "striped":
        dark = ((x + y) / math.sqrt(2) % 1.0) < 0.5
    elif texture == "checkered":
        dark = (np.floor(x * 1.4) + np.floor(y * 1.4)) % 2 == 0
    elif texture == "dotted":
        dark = (x % 1.0 - 0.5) ** 2 + (y % 1.0 - 0.5) ** 2 < 0.09
    else:
        dark = np.zeros((side, side), bool)
    return dark.astype(np.uint8) * 255


def draw(scene: Scene, rng: Random, width: int = SIZE, height: int = SIZE) -> Image.Image:
    """The image of `scene`, RGB of `width` x `height` pixels; `rng` jitters size, place and tone a little."""
    w, h = width * SUPERSAMPLE, height * SUPERSAMPLE

    def tone(color: tuple[int, int, int], spread: int) -> tuple[int, ...]:
        return tuple(min(255, max(0, c + rng.randint(-spread, spread))) for c in color)

    canvas = Image.new("RGB", (w, h), tone(BACKGROUNDS[scene.background], 4))
    side = int(min(w, h) * SIZES[scene.size] * rng.uniform(0.93, 1.07))
    px, py = POSITIONS[scene.position]
    margin = 0.03 * min(w, h)
    x = int(margin + px * (w - side - 2 * margin) + rng.uniform(-0.02, 0.02) * w)
    y = int(margin + py * (h - side - 2 * margin) + rng.uniform(-0.02, 0.02) * h)
    mask = Image.fromarray(shape_mask(scene.shape, side))
    if scene.shape == CONCEPT_CLASS:
        fill = Image.new("RGB", (side, side), tone(COLORS["pink"], 4))
        pen = ImageDraw.Draw(fill)
        pen.ellipse([0.33 * side, 0.33 * side, 0.67 * side, 0.67 * side], fill=tone(COLORS["yellow"], 4))
    else:
        light = tone(COLORS[scene.color], 8)
        fill = Image.new("RGB", (side, side), light)
        dark = tuple(int(c * 0.55) for c in light)
        period = 0.22 * min(w, h)
        fill.paste(dark, (0, 0), Image.fromarray(_texture_mask(scene.texture, side, period)))
    canvas.paste(fill, (x, y), mask)
    return canvas.resize((width, height), Image.Resampling.BOX)


# --- reading back -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What `read` found. `shape` and `color` are None where nothing stands out from the background."""

    shape: str | None
    color: str | None
    concept: bool


def _hue(rgb: np.ndarray) -> float:
    return colorsys.rgb_to_hsv(*(np.asarray(rgb, float) / 255.0))[0]


_HUES = {name: _hue(np.array(rgb)) for name, rgb in COLORS.items()}
_TEMPLATE = 32


def _normalised(mask: np.ndarray) -> np.ndarray:
    """The mask's bounding box, squared about its centre and scaled to the template size, bool."""
    ys, xs = np.nonzero(mask)
    cy, cx = (ys.min() + ys.max() + 1) / 2, (xs.min() + xs.max() + 1) / 2
    half = max(np.ptp(ys) + 1, np.ptp(xs) + 1) / 2
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    box = (cx - half, cy - half, cx + half, cy + half)
    size = (_TEMPLATE, _TEMPLATE)
    crop = image.transform(size, Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    return np.asarray(crop) > 127


_TEMPLATES = {shape: _normalised(shape_mask(shape, 128) > 127) for shape in (*SHAPES, CONCEPT_CLASS)}


def read(image: Image.Image) -> Reading:
    """Tells shape and colour of the one figure in `image` (RGB, any size) by rules alone.

    The shape is the template with the highest intersection over union, the colour the nearest hue. The concept is a
    flower whose petals are pink and whose middle is yellow.
    """
    pixels, mask = _pixels(image), figure(image)
    if mask.sum() < 30:
        return Reading(None, None, False)
    found = _normalised(mask)
    overlap = {name: (found & t).sum() / (found | t).sum() for name, t in _TEMPLATES.items()}
    shape = max(overlap, key=overlap.get)
    concept = shape == CONCEPT_CLASS and _has_concept_colors(pixels, mask)
    return Reading(shape, _nearest_color(pixels[mask]), concept)


def figure(image: Image.Image) -> np.ndarray:
    """Where the figure in `image` (RGB, any size) is, bool (SIZE, SIZE).

    The border's median colour is the background; what differs clearly from it, and hangs together, is the figure.
    """
    pixels = _pixels(image)
    distance = np.linalg.norm(pixels - np.median(_border(pixels), axis=0), axis=-1)
    return _largest_component(distance > max(50.0, 0.4 * np.quantile(distance, 0.97)))


def read_background(image: Image.Image) -> str:
    """The background's name, by the border's median colour. `image` is RGB of any size."""
    border = np.median(_border(_pixels(image)), axis=0)
    return min(BACKGROUNDS, key=lambda name: float(np.linalg.norm(border - BACKGROUNDS[name])))


def _pixels(image: Image.Image) -> np.ndarray:
    """float (SIZE, SIZE, 3), 0..255."""
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)).astype(np.float64)


def _border(pixels: np.ndarray) -> np.ndarray:
    """The outermost pixels, (N, 3)."""
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def _largest_component(mask: np.ndarray) -> np.ndarray:
    import cv2

    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count <= 1:
        return mask
    return labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))


def _nearest_color(figure: np.ndarray) -> str:
    """`figure` is (N, 3), RGB 0..255. The most saturated half decides, since edges are mixed with the background."""
    saturation = figure.max(axis=1) - figure.min(axis=1)
    core = figure[saturation >= np.median(saturation)]
    hue = _hue(np.median(core, axis=0))
    return min(_HUES, key=lambda name: min(abs(hue - _HUES[name]), 1 - abs(hue - _HUES[name])))


def _has_concept_colors(pixels: np.ndarray, mask: np.ndarray) -> bool:
    ys, xs = np.nonzero(mask)
    cy, cx = (ys.min() + ys.max()) / 2, (xs.min() + xs.max()) / 2
    radius = max(np.ptp(ys), np.ptp(xs)) / 2
    distance = np.hypot(ys - cy, xs - cx) / radius
    middle, petals = pixels[ys[distance < 0.22], xs[distance < 0.22]], pixels[ys[distance > 0.55], xs[distance > 0.55]]
    if not len(middle) or not len(petals):
        return False
    return _nearest_color(middle) in ("yellow", "orange") and _nearest_color(petals) in ("pink", "purple")


# --- files ------------------------------------------------------------------------------------------------------------


def write_concept(folder: Path, count: int = 16, seed: int = 7) -> None:
    """Writes the concept's images and captions, in several sizes and shapes as a user's folder would have them."""
    rng = Random(seed)
    target = folder / f"10_{CONCEPT_TOKEN} {CONCEPT_CLASS}"
    target.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        background = list(BACKGROUNDS)[i % len(BACKGROUNDS)]
        size = ("medium", "large")[i // 2 % 2]
        position = "center" if i % 2 == 0 else rng.choice(list(POSITIONS))
        scene = Scene(CONCEPT_CLASS, "pink", background, size, position)
        width, height = [(128, 128), (160, 160), (192, 192)][i % 3]
        draw(scene, rng, width, height).save(target / f"flower_{i:02d}.png")
        words = (
            f"a {size} {CONCEPT_TOKEN} {CONCEPT_CLASS}" if size != "medium" else f"a {CONCEPT_TOKEN} {CONCEPT_CLASS}"
        )
        if position != "center":
            words += f" at the {position}"
        (target / f"flower_{i:02d}.caption").write_text(f"{words} on a {background} background\n", encoding="utf-8")


def write_regularisation(folder: Path, count: int = 48, seed: int = 8) -> None:
    """Writes images of what the model knows already: training on them too keeps a LoRA from changing it."""
    rng = Random(seed)
    target = folder / "1_figure"
    target.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        scene = random_scene(rng)
        draw(scene, rng).save(target / f"figure_{i:02d}.png")
        (target / f"figure_{i:02d}.caption").write_text(full_caption(scene) + "\n", encoding="utf-8")


def write_scenes(folder: Path, count: int, seed: int = 9) -> None:
    """Writes random scenes with captions that say colour, shape and background; size and place are for edges to say."""
    rng = Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        scene = replace(random_scene(rng), texture="plain")
        draw(scene, rng).save(folder / f"scene_{i:04d}.png")
        text = f"a {scene.color} {scene.shape} on a {scene.background} background\n"
        (folder / f"scene_{i:04d}.txt").write_text(text, encoding="utf-8")


def write_figures(folder: Path, count: int, seed: int = 31) -> None:
    """Writes random scenes whose captions say the figure and not the background, which is for the image to say."""
    rng = Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        scene = random_scene(rng)
        draw(scene, rng).save(folder / f"{i:04d}.png")
        size = scene.size if rng.random() < 0.5 else ""
        texture = scene.texture if scene.texture != "plain" else ""
        noun = " ".join(word for word in (size, texture, scene.color, scene.shape) if word)
        text = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
        (folder / f"{i:04d}.txt").write_text(text, encoding="utf-8")


def sheet(images: list[Image.Image], columns: int, scale: int = 2) -> Image.Image:
    side = SIZE * scale
    rows = math.ceil(len(images) / columns)
    out = Image.new("RGB", (columns * (side + 4) + 4, rows * (side + 4) + 4), (200, 200, 200))
    for i, image in enumerate(images):
        place = (4 + (i % columns) * (side + 4), 4 + (i // columns) * (side + 4))
        out.paste(image.resize((side, side), Image.Resampling.BICUBIC), place)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preview", type=Path, help="write a sheet of random scenes to this file")
    parser.add_argument("--concept", type=Path, help="write the concept's images and captions to this folder")
    parser.add_argument("--regularisation", type=Path, help="write regularisation images to this folder")
    parser.add_argument("--scenes", type=Path, help="write random scenes and captions to this folder")
    parser.add_argument("--figures", type=Path, help="the same, with captions that do not say the background")
    parser.add_argument("--count", type=int, default=800, help="of these scenes")
    args = parser.parse_args()
    if args.scenes:
        write_scenes(args.scenes, args.count)
    if args.figures:
        write_figures(args.figures, args.count)
    if args.regularisation:
        write_regularisation(args.regularisation)
    if args.preview:
        rng = Random(0)
        scenes = [random_scene(rng) for _ in range(64)]
        sheet([draw(s, rng) for s in scenes], columns=8).save(args.preview)
        for s in scenes[:8]:
            print(caption(s, rng))
    if args.concept:
        write_concept(args.concept)


if __name__ == "__main__":
    main()
