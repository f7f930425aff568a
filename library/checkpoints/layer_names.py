"""Names of layers in network files, which have underscores for dots, found by the key map of the model's part."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from library.checkpoints.keymap import PLACEHOLDERS, Fused, KeyMap, Rename, SwapHalves

_PARAMETER = re.compile(r"\.(\{p\}|scale|weight)$")  # the end of a rule for a tensor of a layer
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_NUMBER = re.compile(r"\d+")


class Found(NamedTuple):
    """A layer by one of its names."""

    layer: Layer
    piece: int | None  # which of several modules; None: the whole layer
    by_module: bool  # whether the name is that of the live module, where that differs from the original's


@dataclass(frozen=True)
class Layer:
    """A layer of a part of a model, in the original code and in the classes that are run."""

    part: PartNames
    original: str  # "double_blocks.0.img_attn.qkv"
    modules: tuple[str, ...]  # several: a layer that is fused in the original
    shares: tuple[int, ...]  # of the rows, one for each module
    swap_halves: bool  # the halves of the original's rows are the other way round than the module's

    @property
    def kohya(self) -> str:
        """Its name in kohya's files."""
        path = self.modules[0] if self.part.kohya_by_module else self.original
        return f"{self.part.prefixes[0]}_{path.replace('.', '_')}"

    @property
    def comfyui(self) -> str:
        return f"{self.part.comfyui}.{self.original}"

    def diffusers(self, piece: int = 0) -> str:
        return f"{self.part.diffusers}.{self.modules[piece]}"


@dataclass(frozen=True, kw_only=True)
class PartNames:
    """The layers of one part of a model, the denoiser or a text encoder, in each layout of network files."""

    keys: KeyMap  # names in the original code against those of the classes that are run; no rule with {rest}
    prefixes: tuple[str, ...]  # of layers in kohya's files; the first one is written, all are read
    diffusers: str  # before the modules' names in files of diffusers
    comfyui: str  # before the original names in files of ComfyUI
    kohya_by_module: bool = False  # kohya's files have the modules' names
    linear_projections: bool | None = None  # what `proj_in` and `proj_out` are: linear, or 1x1 convolutions

    def find(self, name: str) -> Found | None:
        """A layer by its name in kohya's layout, which may be made of either path; None: there is none."""
        prefix = next((prefix for prefix in self.prefixes if name.startswith(f"{prefix}_")), None)
        if prefix is None:
            return None
        path = name.removeprefix(f"{prefix}_")
        if path.startswith("encoder_layers_"):
            path = f"text_model_{path}"  # a level that transformers' newer classes do not have
        for pattern, rule, side in self._patterns.get(_NUMBER.sub("#", path), ()):
            match = pattern.fullmatch(path)
            if match is not None:
                return self._found(rule, side, match.groupdict())
        return None

    @cached_property
    def _patterns(self) -> dict[str, list[tuple[re.Pattern[str], Rename | Fused, int]]]:
        """(pattern, rule, side) of every layer; side -1 is the original's name, others number the modules.

        By what names have beside numbers, since there are hundreds of patterns.
        """
        rules = [rule for rule in self.keys.rules if _PARAMETER.search(rule.file)]
        names = [(rule.file, rule, -1) for rule in rules]
        names += [(name, rule, side) for rule in rules for side, name in enumerate(rule.models)]
        found: dict[str, list[tuple[re.Pattern[str], Rename | Fused, int]]] = {}
        for name, rule, side in names:
            path = _PARAMETER.sub("", name).replace(".", "_")
            kind = _NUMBER.sub("#", _PLACEHOLDER.sub("0", path))
            # Every second piece is the word of a placeholder.
            pieces = enumerate(_PLACEHOLDER.split(path))
            pattern = "".join(f"(?P<{p}>{PLACEHOLDERS[p]})" if place % 2 else re.escape(p) for place, p in pieces)
            found.setdefault(kind, []).append((re.compile(pattern), rule, side))
        return found

    def _found(self, rule: Rename | Fused, side: int, numbers: dict[str, str]) -> Found:
        def named(template: str) -> str:
            return _PARAMETER.sub("", template).format(**numbers)

        modules = tuple(map(named, rule.models))
        shares = rule.rows if isinstance(rule, Fused) and rule.rows else (1,) * len(modules)
        layer = Layer(self, named(rule.file), modules, shares, isinstance(rule, SwapHalves))
        return Found(layer, side if side >= 0 and len(modules) > 1 else None, side >= 0)
