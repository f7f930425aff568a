"""Names of the text encoders' layers in network files. See `library.checkpoints.layer_names`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from library.checkpoints.keymap import Each, KeyMap, Rename
from library.checkpoints.layer_names import PartNames

LayerSizes = Mapping[str, tuple[int, int]]  # (outputs, inputs) of layers by kohya's names, as far as a file shows them


def _same(prefix: str, *layers: str, outside: str = "") -> KeyMap:
    """Layers that have the same names in the original and in what is run. `outside`: one without the prefix."""
    rules = [Each(prefix, prefix, *(Rename(f"{layer}.{{p}}", f"{layer}.{{p}}") for layer in layers))]
    return KeyMap(*rules, *([Rename(f"{outside}.{{p}}", f"{outside}.{{p}}")] if outside else []))


_CLIP = _same(
    "text_model.encoder.layers.{i}",
    *(f"self_attn.{name}_proj" for name in "qkv"),
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
    "layer_norm1",
    "layer_norm2",
    outside="text_model.final_layer_norm",
)
_T5 = _same(
    "encoder.block.{i}",
    *(f"layer.0.SelfAttention.{name}" for name in "qkvo"),
    *(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
)


@cache
def clip_names(*parts: str, diffusers: str, comfyui: str) -> PartNames:
    """A CLIP encoder. `parts`: its names in kohya's layout, the one that is written first."""
    prefixes = tuple(f"lora_{part}" for part in parts)
    return PartNames(keys=_CLIP, prefixes=prefixes, diffusers=diffusers, comfyui=f"text_encoders.{comfyui}.transformer")


@cache
def t5_names(*parts: str, diffusers: str) -> PartNames:
    """A T5 encoder; see `clip_names`."""
    prefixes = tuple(f"lora_{part}" for part in parts)
    return PartNames(keys=_T5, prefixes=prefixes, diffusers=diffusers, comfyui="text_encoders.t5xxl.transformer")
