"""Which programs read which network files, by type, layout and model. The one place for these facts.

What is not listed is not known, or known not to work. docs/networks.md and docs/files.md say how they were found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from library.families.registry import FAMILIES
from networks.registry import BOFT, FULL, GLORA, IA3, LOCON, LOHA, LOKR, LORA, NORM, OFT, SET

DORA = "DoRA"  # of any type that has magnitudes
KOHYA, DIFFUSERS, COMFYUI = "kohya", "diffusers", "comfyui"  # layouts, as networks/convert_lora.py names them
BFL = "bfl"  # that of the original names alone, which control LoRAs are published with

_ALL = frozenset(FAMILIES)
_LORA = frozenset({LORA.label, LOCON.label})
_CHANGES = _LORA | {DORA, LOHA.label, LOKR.label, GLORA.label, FULL.label, NORM.label}


@dataclass(frozen=True)
class Program:
    """A program that uses network files."""

    name: str
    types: frozenset[str]  # labels of types of layers
    families: Mapping[str, frozenset[str]]  # layout -> names of families of which it is read
    # (layout, family) -> what is read there, where that is less: labels of types, and parts of the model, of which
    # only layers in blocks.
    less: Mapping[tuple[str, str], tuple[frozenset[str], frozenset[str]]] = field(default_factory=dict)

    def unread(self, family: str, layout: str | None, part: str, type_label: str, in_block: bool) -> str | None:
        """Why a layer is not read, or None where it is.

        Args:
            family: name of the model's family.
            layout: of the file; None: one that is not known here.
            part: "unet", or kohya's name of a text encoder.
            type_label: of the layer.
            in_block: whether the layer is in one of the model's repeated blocks.
        """
        if family not in self.families.get(layout or "", ()):
            label = FAMILIES[family].traits.label
            return f"is not known to read {layout or 'this'} names of {label}"
        if type_label not in self.types:
            return f"does not read {type_label}"
        types, parts = self.less.get((layout or "", family), (self.types, None))
        if type_label not in types:
            return f"does not read {type_label} in {layout} names"
        if parts is not None and not (part in parts and in_block):
            return f"does not read these layers of {part} in {layout} names"
        return None


PROGRAMS = (
    Program(
        "ComfyUI",
        _CHANGES | {OFT.label, BOFT.label, SET.label},
        {KOHYA: _ALL, COMFYUI: _ALL, DIFFUSERS: frozenset({"sd3", "flux"}), BFL: frozenset({"flux"})},
    ),
    Program("Forge", _CHANGES, {KOHYA: _ALL, COMFYUI: _ALL, DIFFUSERS: frozenset({"flux"})}),
    Program("AUTOMATIC1111", _CHANGES | {IA3.label, OFT.label}, {KOHYA: frozenset({"sd", "sdxl"})}),
    Program(
        "diffusers",
        _LORA | {DORA, SET.label},
        {KOHYA: frozenset({"sd", "sdxl", "flux"}), DIFFUSERS: _ALL, BFL: frozenset({"flux"})},
        {(KOHYA, "flux"): (_LORA, frozenset({"unet", "te1", "te"}))},
    ),
)
