"""The layers of a model that a network file has, whatever its layout: which model, which layers, cut and joined."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from library.checkpoints.keymap import first_few
from library.checkpoints.layer_names import Found, Layer, PartNames
from library.errors import UserError
from library.families.registry import FAMILIES
from library.model_tools.network_io import Source
from networks.files import PREFIXES, Entries, swapped
from networks.fused import DORA, cut, join, rows_by_share
from networks.layers.locon import DOWN, UP
from networks.registry import type_of

Layout = Literal["kohya", "diffusers", "comfyui", "bfl"]
# Beginnings of names by which layouts are known.
_LAYOUTS: dict[Layout, re.Pattern[str]] = {
    "kohya": re.compile(rf"({'|'.join(PREFIXES)})_(unet|te\d*)_"),
    "diffusers": re.compile(r"(transformer|unet|text_encoder(_[23])?)\."),
    "comfyui": re.compile(r"(diffusion_model|text_encoders)\."),
    "bfl": re.compile(r"((double|single)_blocks|(img|txt|time|vector|guidance)_in|final_layer)\.(?!\d+\.processor\.)"),
}
_PREFIX = re.compile(rf"({'|'.join(PREFIXES)})_")


@dataclass
class Placed:
    """A layer of a model, with what a file has of it: all of it, or modules of it."""

    layer: Layer
    prefix: str  # of kohya's name: lora, or what another type of network has
    whole: dict[str, Tensor] | None = None
    pieces: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def joined(self) -> dict[str, Tensor]:
        """The layer as the original has it."""
        if self.whole is not None:
            return self.whole
        place, known = next(iter(self.pieces.items()))
        require_lora(known)
        unit = len(known[UP]) // self.layer.shares[place]
        rows = [unit * share for share in self.layer.shares]
        return join([self.pieces.get(n) for n in range(len(rows))], rows)

    def separate(self) -> dict[int, dict[str, Tensor]]:
        """The modules of the layer, as the classes that are run have them."""
        if self.whole is None:
            return self.pieces
        if len(self.layer.modules) == 1:
            return {0: swapped(self.whole) if self.layer.swap_halves else self.whole}
        require_lora(self.whole)
        pieces = cut(self.whole, rows_by_share(len(self.whole[UP]), self.layer.shares))
        return {place: piece for place, piece in enumerate(pieces) if piece is not None}


def layout_of(names: Iterable[str]) -> Layout | None:
    """The layout of a file with these tensor names; None: another."""
    names = list(names)
    found = (layout for layout, pattern in _LAYOUTS.items() if all(map(pattern.match, names)))
    return next(found, None)


def parts_of(source: Source, family: str | None = None) -> tuple[PartNames, ...]:
    """The parts of the model that a file is for.

    Args: family: its name; None: the one family that knows all layers.
    Raises: UserError: there is none, or several are equally likely.
    """
    if family is not None and family not in FAMILIES:
        raise UserError(f"--family: must be one of {', '.join(FAMILIES)}, got {family!r}")
    sizes = {layer: (len(entry[UP]), entry[DOWN].shape[1]) for layer, entry in source.entries.items() if DOWN in entry}
    unknown: dict[str, list[str]] = {}
    parts = {}
    for name in [family] if family else FAMILIES:
        parts[name] = FAMILIES[name].layer_names(sizes)
        unknown[name] = [layer for layer in source.entries if _place(parts[name], layer) is None]
    fewest = min(map(len, unknown.values()))
    best = [name for name in parts if len(unknown[name]) == fewest]
    if fewest:
        label = f"in {FAMILIES[best[0]].traits.label}" if len(best) == 1 else "in any model that is known here"
        raise UserError(f"{source.path}: {fewest} of its layers are not {label}: {first_few(unknown[best[0]], 2)}")
    if len(best) > 1:
        raise UserError(f"{source.path}: its layers are in models of {', '.join(best)}; say which with --family")
    return parts[best[0]]


def _place(parts: Sequence[PartNames], layer: str) -> Found | None:
    name = _PREFIX.sub("lora_", layer, count=1)
    return next((found for part in parts if (found := part.find(name))), None)


def placed(entries: Entries, parts: Sequence[PartNames]) -> dict[str, Placed]:
    """The layers by their names in kohya's layout. Raises: UserError: the file has a layer twice."""
    found: dict[str, Placed] = {}
    for name, entry in entries.items():
        layer, piece, by_module = _place(parts, name)
        match = _PREFIX.match(name)
        own = found.setdefault(layer.kohya, Placed(layer, match[1] if match else PREFIXES[0]))
        if own.whole is not None or piece in own.pieces or (piece is None and own.pieces):
            raise UserError(f"{name}: the file has this layer twice, under names of two layouts")
        if piece is not None:
            own.pieces[piece] = entry
        else:
            own.whole = swapped(entry) if layer.swap_halves and by_module else entry
    return found


def with_one_naming(sources: Sequence[Source]) -> list[Source]:
    """Files that name the same layers otherwise than each other, all in kohya's layout; else as they are.

    Files whose layers are of no family stay as they are too.
    """
    try:
        all_parts = [parts_of(source) for source in sources]
    except UserError:
        return list(sources)
    names: dict[str, dict[int | None, set[str]]] = {}
    for source, parts in zip(sources, all_parts, strict=True):
        for name in source.entries:
            found = _place(parts, name)
            names.setdefault(found.layer.kohya, {}).setdefault(found.piece, set()).add(name)
    same = all(
        all(len(known) == 1 for known in pieces.values()) and not (None in pieces and len(pieces) > 1)
        for pieces in names.values()
    )
    if same:
        return list(sources)
    return [
        replace(source, entries={name: own.joined() for name, own in placed(source.entries, parts).items()}, names={})
        for source, parts in zip(sources, all_parts, strict=True)
    ]


def require_lora(entry: Mapping[str, Tensor]) -> None:
    """Raises: UserError: what this layer has can neither be cut or joined nor be in PEFT's layout."""
    if DOWN not in entry:
        kind = type_of(entry)
        raise UserError(
            f"is {kind.label if kind else 'of no known type'}; only LoRA, LoCon and DoRA can be put into this layout"
        )
    if DORA in entry and len(entry[DORA]) == 1 and len(entry[UP]) > 1:
        raise UserError("is DoRA with norms of columns, which diffusers and PEFT do not have")
