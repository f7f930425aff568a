"""Weights of blocks when networks are merged: `--lbws`, as a list of numbers for U-Nets or by the blocks' names.

A list has 12, 17, 20 or 26 numbers for the slots BASE (text encoders), IN00 to IN11, MID, OUT00 to OUT11, of which the
shorter lists name those that matter. By names, the blocks of any model can be weighed, as in
"input_blocks.0-5=0.5,te1=0,*=1".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from library.errors import UserError
from networks.files import PREFIXES

BASE, FIRST_IN, MIDDLE, FIRST_OUT, SLOTS = 0, 1, 13, 14, 26
# The slots that a list of so many numbers names. 12 and 20 are of U-Nets with nine blocks on either side.
LISTS: dict[int, tuple[int, ...]] = {
    12: (BASE, *(FIRST_IN + n for n in (4, 5, 7, 8)), MIDDLE, *(FIRST_OUT + n for n in range(6))),
    17: (BASE, *(FIRST_IN + n for n in (1, 2, 4, 5, 7, 8)), MIDDLE, *(FIRST_OUT + n for n in range(3, 12))),
    20: (BASE, *(FIRST_IN + n for n in range(9)), MIDDLE, *(FIRST_OUT + n for n in range(9))),
    26: tuple(range(SLOTS)),
}
PER_LEVEL = 3  # blocks of a level of a U-Net
FORM = "give 12, 17, 20 or 26 numbers as in [1,0.5,...], or blocks by name as in input_blocks.0-5=0.5,te1=0,*=1"

_PREFIX = re.compile(rf"(?:{'|'.join(PREFIXES)})_")
_DIFFUSERS = re.compile(r"unet_(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_")
_ORIGINAL = re.compile(r"unet_(input|output)_blocks_(\d+)_")


@dataclass(frozen=True)
class Rule:
    name: str  # as the user gave it
    fits: Callable[[str], bool]  # takes a layer's name without the network's prefix
    weight: float


@dataclass(frozen=True)
class BlockWeights:
    """The weights that one network is merged with."""

    text: str  # as given, for messages and metadata
    rules: tuple[Rule, ...]
    is_list: bool

    def factor(self, layer: str) -> float:
        """The weight of a layer: that of the first rule that fits, 1 where none does.

        Args: layer: its key in network files, e.g. "lora_unet_down_blocks_0_attentions_0_proj_in".
        """
        name = _PREFIX.sub("", layer, count=1)
        return next((rule.weight for rule in self.rules if rule.fits(name)), 1.0)

    def check(self, layers: Iterable[str]) -> None:
        """Raises: UserError: a list of numbers for a model without such blocks, or a name that no layer has."""
        names = [_PREFIX.sub("", layer, count=1) for layer in layers]
        if self.is_list:
            outside = [name for name in names if slot_of(name) is None]
            if len(outside) > len(names) / 2:
                raise UserError(
                    f"--lbws {self.text}: numbers alone are for the blocks of U-Nets, and {outside[0]} is in none of "
                    "them; give the blocks by name, which is how the layer's name begins, with dots: name.0-9=0.5"
                )
            return
        idle = [rule.name for rule in self.rules if rule.name != "*" and not any(map(rule.fits, names))]
        if idle:
            raise UserError(
                f"--lbws {self.text}: no layer of the network is in {', '.join(idle)}; its first layer is {names[0]}"
            )


def parse(text: str) -> BlockWeights:
    """The weights of one network, from a JSON list of numbers or from names. Raises: UserError: neither of them."""
    if not text.strip().startswith("["):
        return BlockWeights(text, tuple(_named(part, text) for part in text.split(",")), is_list=False)
    try:
        numbers = json.loads(text)
    except ValueError:
        raise UserError(f"--lbws {text}: this is no list; {FORM}") from None
    if any(isinstance(n, bool) or not isinstance(n, int | float) or not math.isfinite(n) for n in numbers):
        raise UserError(f"--lbws {text}: not all of it are numbers; {FORM}")
    if len(numbers) not in LISTS:
        raise UserError(f"--lbws {text}: {len(numbers)} numbers; {FORM}")
    slots = zip(LISTS[len(numbers)], numbers, strict=True)
    rules = (Rule(str(slot), lambda name, slot=slot: slot_of(name) == slot, float(weight)) for slot, weight in slots)
    return BlockWeights(text, tuple(rules), is_list=True)


def parse_all(texts: Sequence[str] | None, networks: int) -> list[BlockWeights | None]:
    """`parse` of one text for each of so many networks; None for each where no weights are given.

    Raises: UserError: another number of texts, or one that cannot be read.
    """
    if not texts:
        return [None] * networks
    if len(texts) != networks:
        raise UserError(f"--lbws: {len(texts)} given for {networks} networks; give one for each, in quotes")
    return [parse(text) for text in texts]


def slot_of(name: str) -> int | None:
    """The slot of 26 that a layer of a U-Net or its text encoders belongs to; None: none.

    Args: name: the layer's key in network files without the network's prefix, in the original or diffusers' names.
    """
    if name.startswith("te"):
        return BASE
    if name.startswith(("unet_mid_block_", "unet_middle_block_")):
        return MIDDLE
    if name.startswith("unet_conv_in"):
        return FIRST_IN
    match = _ORIGINAL.match(name)
    if match:
        way, place = match[1], int(match[2])
        slot = (FIRST_IN if way == "input" else FIRST_OUT) + place
        return slot if place < MIDDLE - FIRST_IN else None
    match = _DIFFUSERS.match(name)
    if match is None:
        return None
    way, level, kind, layer = match[1], int(match[2]), match[3], int(match[4])
    # The sampler of a level is a block of its own on the way down, and part of the level's last one on the way up.
    place = PER_LEVEL * level + (PER_LEVEL - 1 if kind.endswith("samplers") else layer)
    slot = FIRST_IN + 1 + place if way == "down" else FIRST_OUT + place
    return slot if slot < (MIDDLE if way == "down" else SLOTS) else None


def _named(part: str, text: str) -> Rule:
    """The rule of one `name=weight`. Names are those of modules, with ranges in place of numbers; `*` is everything."""
    name, equals, number = (piece.strip() for piece in part.partition("="))
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not equals or not name or not math.isfinite(weight):
        raise UserError(f"--lbws {text}: {part.strip() or 'an empty part'} is no name=number; {FORM}")
    if name == "*":
        return Rule(name, lambda layer: True, weight)
    pattern, ranges = [], []
    for segment in name.split("."):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", segment)
        if bounds is None and not re.fullmatch(r"\w+", segment):
            raise UserError(f"--lbws {text}: {name} cannot be read at {segment!r}; {FORM}")
        if bounds is not None:
            ranges.append((int(bounds[1]), int(bounds[2] or bounds[1])))
        pattern.append(r"(\d+)" if bounds else re.escape(segment))
    whole = re.compile(rf"(?:unet_)?{'_'.join(pattern)}(?:_|$)")

    def fits(layer: str) -> bool:
        match = whole.match(layer)
        return match is not None and all(
            first <= int(found) <= last for found, (first, last) in zip(match.groups(), ranges, strict=True)
        )

    return Rule(name, fits, weight)
