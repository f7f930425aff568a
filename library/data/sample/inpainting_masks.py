"""Masks for inpainting: what of an image is drawn again, at random for training, and one shape for sample images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from library.data.sample.opencv import opencv
from library.types import Size

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

_CLOUD, _POLYGONS = 0.4, 0.35  # how often each kind is drawn; the rest are ellipses and rectangles
_OCTAVES, _CELL = 4, 16  # of a cloud; pixels between the values of the finest noise
_CLOUD_AREA = (0.1, 0.3)  # shares of the image
_WITH_ANOTHER = 0.33  # how often a cloud has a polygon or a shape beside it
_AREA = (0.1, 0.6)  # of the circle around a polygon, and of shapes
_CORNERS, _INNERMOST = 6, 0.6  # of a polygon; share of the circle's radius
_POINTS, _HARMONICS, _ELLIPSE_AREA, _WOBBLE = 128, 4, 0.2, 0.12  # of the outline in sample images


def random_mask(size: Size, seed: int) -> NDArray[np.bool_]:
    """A random mask, (height, width), true where a model for inpainting is to draw; equal for equal arguments.

    A cloud of about a fifth of the image, sometimes with a shape beside it, or polygons, an ellipse or a rectangle.
    """
    rng = np.random.default_rng(seed)
    kind = rng.random()
    if kind < _CLOUD:
        mask = _cloud(size, rng)
        if rng.random() < _WITH_ANOTHER:
            mask |= _polygons(size, rng) if rng.random() < 0.5 else _shape(size, rng)
        return mask
    return _polygons(size, rng) if kind < _CLOUD + _POLYGONS else _shape(size, rng)


def wobbly_ellipse(size: Size, seed: int) -> NDArray[np.bool_]:
    """An ellipse with an uneven outline in the middle, about a fifth of the image; otherwise as `random_mask`."""
    rng = np.random.default_rng(seed)
    angles = np.linspace(0, 2 * math.pi, _POINTS, endpoint=False)
    radius = np.ones(_POINTS)
    for harmonic in range(1, _HARMONICS + 1):
        radius += _WOBBLE / harmonic * rng.random() * np.cos(harmonic * angles + 2 * math.pi * rng.random())
    radius *= math.sqrt(_ELLIPSE_AREA / math.pi / np.mean(radius**2))
    centre = np.array(size) / 2
    return _filled(size, centre + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1) * size)


def _between(limits: tuple[float, float], rng: Generator) -> float:
    return limits[0] + (limits[1] - limits[0]) * rng.random()


def _cloud(size: Size, rng: Generator) -> NDArray[np.bool_]:
    """The highest places of a sum of smooth noises, each twice as fine and half as strong as the one before it."""
    cv2 = opencv()
    height = np.zeros((size.height, size.width), np.float32)
    for octave in range(_OCTAVES):
        cell = _CELL * 2 ** (_OCTAVES - 1 - octave)
        values = rng.random((-(-size.height // cell) + 1, -(-size.width // cell) + 1)).astype(np.float32)
        height += 0.5**octave * cv2.resize(values, size, interpolation=cv2.INTER_CUBIC)
    return height > np.quantile(height, 1 - _between(_CLOUD_AREA, rng))


def _polygons(size: Size, rng: Generator) -> NDArray[np.bool_]:
    """One or two polygons, anywhere."""
    mask = np.zeros((size.height, size.width), bool)
    for _ in range(1 if rng.random() < 0.5 else 2):
        radius = math.sqrt(_between(_AREA, rng) * size.width * size.height / math.pi)
        angles = np.sort(2 * math.pi * rng.random(_CORNERS))
        reach = radius * (_INNERMOST + (1 - _INNERMOST) * rng.random(_CORNERS))
        centre = rng.random(2) * size
        mask |= _filled(size, centre + reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1))
    return mask


def _shape(size: Size, rng: Generator) -> NDArray[np.bool_]:
    """An ellipse or a rectangle, all of it inside the image."""
    is_ellipse = rng.random() < 0.5
    sides = np.array([math.sqrt(_AREA[0]), math.sqrt(_AREA[0])])
    sides = (sides + (math.sqrt(_AREA[1]) - sides) * rng.random(2)) * size
    left, top = rng.random(2) * (np.array(size) - sides)
    x, y = np.arange(size.width) + 0.5 - left, np.arange(size.height)[:, None] + 0.5 - top
    if is_ellipse:
        return (2 * x / sides[0] - 1) ** 2 + (2 * y / sides[1] - 1) ** 2 <= 1
    return (x >= 0) & (x <= sides[0]) & (y >= 0) & (y <= sides[1])


def _filled(size: Size, points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The inside of a closed line through these (x, y)."""
    plane = np.zeros((size.height, size.width), np.uint8)
    opencv().fillPoly(plane, [np.round(points).astype(np.int32)], 1)
    return plane.astype(bool)
