"""Layers whose inputs are rotated: those of LoRA, convolutions on request, and patterns. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from networks.arguments import Reader
from networks.selection import Choice, Selection, TargetLayer
from networks.selections.named import Patterns, fits, patterns


@dataclass(frozen=True)
class RotatedSelection(Selection):
    """`exclude` leaves layers out, of which `include` brings some back; `include` alone leaves out all others.

    Patterns fit as those of `NamedSelection`.
    """

    NAMES = ("enable_conv", "include_patterns", "exclude_patterns", "verbose")

    conv: bool = False
    include: Patterns = ()
    exclude: Patterns = ()

    @classmethod
    def read(cls, reader: Reader) -> RotatedSelection:
        return cls(
            conv=reader.flag("enable_conv"),
            include=patterns(reader, "include_patterns"),
            exclude=patterns(reader, "exclude_patterns"),
            verbose=reader.flag("verbose"),
        )

    def warnings(self, given: Mapping[str, str], *, module: str, ranks_from_file: bool) -> list[str]:
        sizes = [name for name in given if name.endswith(("block_size", "block_num", "butterfly_factor"))]
        return [f"--network_args: {name} has no effect with --dim_from_weights" for name in sizes if ranks_from_file]

    def choose(self, layer: TargetLayer, dim: int, alpha: float | None) -> Choice | None:
        target = layer.target
        if target.optional or ((target.conv_only or layer.kernel) and not self.conv):
            return None
        names = (target.key, layer.path, *target.modules)
        included = fits(self.include, names)
        wanted = included or not (self.include or fits(self.exclude, names))
        return Choice(dim, alpha) if wanted else None
