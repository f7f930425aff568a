"""Layers by kind, as for U-Nets, and by the names of modules. No torch here."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass

from networks.arguments import Reader, from_file_warnings
from networks.selection import Choice, TargetLayer
from networks.selections.unet import UnetSelection

Patterns = tuple[re.Pattern[str], ...]


@dataclass(frozen=True)
class NamedSelection(UnetSelection):
    """The layers of `UnetSelection`, without block lists; patterns leave layers out, and others bring some back.

    A pattern fits a layer where it matches the whole of its module's dotted name, in the live model or in the original
    one, or its name in files.
    """

    # fmt: off
    NAMES = (
        "conv_dim", "conv_alpha", "exclude_patterns", "include_patterns", "verbose", "train_t5xxl",
        "network_reg_dims", "network_reg_lrs",
    )
    # fmt: on

    exclude: Patterns = ()
    include: Patterns = ()
    train_t5xxl: bool = False

    @classmethod
    def read(cls, reader: Reader) -> NamedSelection:
        kinds = UnetSelection.read(reader)
        return cls(
            **{**vars(kinds), "verbose": reader.flag("verbose")},
            exclude=patterns(reader, "exclude_patterns"),
            include=patterns(reader, "include_patterns"),
            train_t5xxl=reader.flag("train_t5xxl"),
        )

    def warnings(self, given: Mapping[str, str], *, module: str, ranks_from_file: bool) -> list[str]:
        lines = []
        if "conv_alpha" in given and "conv_dim" not in given:
            lines.append("--network_args: conv_alpha has no effect without conv_dim")
        if "include_patterns" in given and "exclude_patterns" not in given:
            lines.append("--network_args: include_patterns has no effect without exclude_patterns")
        return lines + (from_file_warnings(given) if ranks_from_file else [])

    def choose(self, layer: TargetLayer, dim: int, alpha: float | None) -> Choice | None:
        target = layer.target
        names = (target.key, layer.path, *target.modules)
        if fits(self.exclude, names) and not fits(self.include, names):
            return None
        if target.optional and target.part != "denoiser" and not target.from_file and self.train_t5xxl:
            own_dim = self.own_dim(target.key)
            return None if own_dim == 0 else Choice(own_dim or dim, alpha)
        return super().choose(layer, dim, alpha)


def fits(patterns: Patterns, names: tuple[str, ...]) -> bool:
    return any(pattern.fullmatch(name) for pattern in patterns for name in names)


def patterns(reader: Reader, name: str) -> Patterns:
    """``['attn.*', 'ff.*']``: a list as Python writes it, or a single pattern."""
    text = reader.args.get(name, "").strip()
    if not text:
        return ()
    try:
        entries = ast.literal_eval(text) if text.startswith("[") else [text]
    except (ValueError, SyntaxError):
        reader.refuse(name, "is not a list of texts, e.g. ['.*attn1.*']")
        return ()
    try:
        return tuple(re.compile(str(entry)) for entry in entries)
    except re.error as error:
        reader.refuse(name, f"holds no regular expression ({error})")
        return ()
