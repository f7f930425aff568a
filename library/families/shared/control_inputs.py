"""Network files by which a denoiser reads a control image beside its latents, found by their headers. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.reading import file_format, read_header
from library.errors import UserError
from networks.layouts import kohya_name

if TYPE_CHECKING:
    from library.families.spec import FamilySpec


def reads_control(spec: FamilySpec, path: str | Path) -> bool:
    """Whether the layer that reads latents has more inputs in this file than in the family's models.

    False for files that cannot be read: their readers say why.
    """
    try:
        tensors = read_header(path)[1] if file_format(path) == "safetensors" else {}
    except UserError:
        return False
    for name, (_, shape) in tensors.items():
        layer, _, tensor = kohya_name(name).partition(".")
        inputs = spec.input_layers.get(layer)
        if inputs is not None and tensor == "lora_down.weight" and len(shape) > 1 and shape[1] > inputs:
            return True
    return False
