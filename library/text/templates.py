"""Captions for images that have none, around the word that Textual Inversion trains.

Every step draws one of them, as in "An Image is Worth One Word" (Gal et al. 2022): they differ in what an image may be,
so that the word takes up what all images have in common.
"""

from __future__ import annotations

WORD = "{}"

OBJECT_TEMPLATES = (
    "a photo of {}",
    "a photo of a {}",
    "a photo of the {}",
    "a photo of one {}",
    "a photo of my {}",
    "a close-up of a {}",
    "a cropped image of the {}",
    "a bright photo of a {}",
    "a dark photo of the {}",
    "a sharp photo of a {}",
    "a detailed image of the {}",
    "a simple image of a {}",
    "an image of a small {}",
    "an image of a large {}",
    "a {} seen from near",
    "a {} seen from afar",
)

STYLE_TEMPLATES = (
    "an image in the style of {}",
    "a painting in the style of {}",
    "a drawing in the style of {}",
    "a render in the style of {}",
    "a detailed painting in the style of {}",
    "a simple drawing in the style of {}",
    "a bright image in the style of {}",
    "a dark image in the style of {}",
    "a cropped painting in the style of {}",
    "a small image in the style of {}",
    "a large painting in the style of {}",
    "a scene in the style of {}",
)


def fill(templates: tuple[str, ...], word: str) -> tuple[str, ...]:
    """The templates with `word` in its place."""
    return tuple(template.replace(WORD, word) for template in templates)
