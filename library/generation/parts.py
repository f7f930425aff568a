"""Prompts of several parts, joined by AND: which parts one has, and which mask says where they count. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.generation.sources import files_of, require_image
from library.inference.prompts import RegionMask
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from library.options.base import Options
    from library.types import FamilyTraits

_BETWEEN = " AND "


@dataclass(frozen=True)
class Regional:
    """How prompts of several parts are drawn.

    Args: masks: files, taken in turn; (): parts count everywhere.
    """

    masks: tuple[Path, ...]
    colors: int | None
    networks: int  # that are attached, and act in regions
    pre_calc: bool
    possible: bool  # whether the family has regions
    family: str

    @classmethod
    def of(cls, opts: Options, traits: FamilyTraits) -> Regional:
        """As the options say. Raises: UserError: the masks are not there."""
        networks, path = opts.networks, opts.source.mask_path
        return cls(
            files_of("--mask_path", path) if path else (),
            networks.network_regional_mask_max_color_codes,
            len(networks.network_weights or ()) - networks.merged(),
            networks.network_pre_calc,
            traits.text_regions,
            traits.label,
        )

    def fields(self, own: Mapping[str, Any], number: int, where: str) -> dict[str, Any]:
        """The fields that a prompt gets by the parts it has.

        Args: own: those that it has. number: of the image.
        Raises: UserError: parts that cannot be drawn.
        """
        if _BETWEEN not in own["prompt"]:
            if self.masks and "source" not in own:
                LOGGER.warning("%s: --mask_path has no effect: this prompt has no parts joined by AND", where)
            return {}
        parts = tuple(part.strip() for part in own["prompt"].split(_BETWEEN))
        if not all(parts):
            raise UserError(f"{where}: there is no text before or behind an AND")
        if not self.masks:
            return {"parts": parts}
        if not self.possible:
            raise UserError(f"{where}: --mask_path: {self.family} has no regions; without it parts count everywhere")
        if self.pre_calc and self.networks:
            raise UserError(f"{where}: --network_pre_calc: cannot be used with regions; leave it out")
        if self.networks > len(parts):
            raise UserError(f"{where}: {too_many(self.networks, len(parts))}")
        mask = self.masks[number % len(self.masks)]
        require_image(mask, where)
        found: dict[str, Any] = {"parts": parts, "regions": RegionMask(mask, self.colors)}
        if "source" in own:  # the mask is that of regions
            found["source"] = replace(own["source"], mask=None)
        return found


def too_many(networks: int, parts: int) -> str:
    return f"the prompt has {parts} parts joined by AND, and there are {networks} networks; at most one for each part"
