"""`python examples/tiny_tagger/make_tagger.py` writes the tagger of this folder; see README.md."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
SIDE = 8  # pixels of the images that it looks at
RATINGS = ("general", "sensitive", "questionable", "explicit")
_RATING, _GENERAL = "9", "0"  # categories of selected_tags.csv


def measures() -> dict[str, np.ndarray]:
    """Weights of (row, column, blue/green/red) whose sums with an image, 0 to 1, measure something about it."""
    across = np.broadcast_to(np.linspace(-1, 1, SIDE), (SIDE, SIDE))
    edge = np.ones((SIDE, SIDE))
    edge[1:-1, 1:-1] = 0
    pink = np.array([1, -2, 1])  # 0 for every grey
    return {
        "light": edge[..., None] * np.ones(3) / 3 / edge.sum(),
        "pink": np.ones((SIDE, SIDE, 1)) * pink / SIDE**2,
        "right": across[..., None] * pink / SIDE**2,
        "low": across.T[..., None] * pink / SIDE**2,
    }


# Tag: (measure, how steeply it counts, where it is as likely as not).
TAGS = {
    "light_background": ("light", 30, 0.65),
    "dark_background": ("light", -30, 0.40),
    "flower": ("pink", 200, 0.03),
    "pink_flower": ("pink", 200, 0.03),
    "on_the_left": ("right", -200, -0.03),
    "on_the_right": ("right", 200, 0.03),
    "at_the_top": ("low", -200, -0.03),
    "at_the_bottom": ("low", 200, 0.03),
}


def write(folder: Path) -> None:
    """Writes model.onnx and selected_tags.csv."""
    from tests.builders.onnx_file import write_tagger

    found, columns, bias = measures(), [np.zeros(SIDE * SIDE * 3)] * len(RATINGS), [3.0, -3.0, -3.0, -3.0]
    for measure, steepness, middle in TAGS.values():
        columns.append(steepness * found[measure].reshape(-1) / 255)
        bias.append(-steepness * middle)
    weight = np.stack(columns, axis=1).astype(np.float32)
    write_tagger(folder / "model.onnx", weight, np.array(bias, np.float32), ("N", SIDE, SIDE, 3))
    labels = [*((name, _RATING) for name in RATINGS), *((name, _GENERAL) for name in TAGS)]
    rows = [f"{number},{name},{category},1" for number, (name, category) in enumerate(labels)]
    text = "\n".join(["tag_id,name,category,count", *rows]) + "\n"
    (folder / "selected_tags.csv").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parent.parent))
    write(FOLDER)
