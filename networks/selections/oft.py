"""Layers that sd-scripts' OFT rotates: those of attention in the denoiser, and others on request. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from networks.arguments import Reader
from networks.selection import Choice, Selection, TargetLayer

ATTENTION = ("CrossAttention", "SelfAttention")
ATTENTION_PATH = re.compile(r"\.attn2?\.")  # where it is no module of its own


@dataclass(frozen=True)
class OftSelection(Selection):
    """`all_linear`: every layer of transformer blocks; `conv`: those of resnets and samplers too."""

    NAMES = ("enable_all_linear", "enable_conv")

    all_linear: bool = False
    conv: bool = False

    @classmethod
    def read(cls, reader: Reader) -> OftSelection:
        return cls(all_linear=reader.flag("enable_all_linear"), conv=reader.flag("enable_conv"))

    def choose(self, layer: TargetLayer, dim: int, alpha: float | None) -> Choice | None:
        target = layer.target
        if target.part != "denoiser" or target.optional:
            return None
        if target.conv_only or layer.kernel:
            return Choice(dim, alpha) if self.conv else None
        attends = any(name in ATTENTION for _, name in layer.classes) or ATTENTION_PATH.search(layer.path)
        return Choice(dim, alpha) if attends or self.all_linear else None
