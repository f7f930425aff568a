"""The blocks of models by the names of layers in kohya's layout, and their order."""

from __future__ import annotations

import re

PREFIX = re.compile(r"(?:lora|oft|lycoris)_(?P<part>unet|te\d*)_(?P<path>.+)")
_BLOCK = re.compile(
    r"(?P<kind>(?:[a-z]+_)*?(?:blocks?|layers))_(?P<number>\d+)(?:_(?:attentions|resnets)_(?P<inner>\d+))?"
)
_MIDDLE, OUTSIDE = "mid_block", "outside blocks"


def block_of(layer: str) -> tuple[str, str]:
    """Part and block of a layer by its name in kohya's layout, e.g. ("unet", "down_blocks 0.1")."""
    match = PREFIX.fullmatch(layer)
    if match is None:
        return "unet", layer
    path = match["path"]
    found = _BLOCK.match(path)
    if found is None:
        return match["part"], _MIDDLE if path.startswith(_MIDDLE) else OUTSIDE
    kind = found["kind"].removeprefix("text_model_").removeprefix("encoder_")
    inner = "" if found["inner"] is None else f".{found['inner']}"
    return match["part"], f"{kind} {found['number']}{inner}"


def run_order(block: str) -> tuple[int, str, list[int]]:
    """By this, blocks of a part are in the order in which models run them."""
    kind, _, numbers = block.partition(" ")
    late = {"mid": 1, "middle": 1, "up": 2, "output": 2, "single": 2}.get(kind.partition("_")[0], 0)
    place = 3 if block == OUTSIDE else late
    return place, kind, [int(number) for number in numbers.split(".") if number.isdecimal()]
