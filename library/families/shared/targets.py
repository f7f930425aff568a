"""Layers that a network may adapt, found by the classes of what contains them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from library.families.shared.clip import public_name
from library.types import LoraTarget

if TYPE_CHECKING:
    from torch import nn

CLIP_CONTAINERS = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
UNET_CONTAINERS = ("Transformer2DModel",)
UNET_ENDS = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
LAST_NORM = "conv_norm_out"
CONV_CONTAINERS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")  # only for networks that train convolutions too


def clip_targets(text_encoder: nn.Module, part: str) -> list[LoraTarget]:
    """The linear layers of a CLIP text encoder's attention and MLP, in the model's order.

    Args:
        part: the encoder's name, which is also in the keys.
    """
    return [
        LoraTarget(lora_key(part, public_name(path)), part, (path,))
        for _, path in layers(text_encoder, CLIP_CONTAINERS)
    ]


def clip_norms(text_encoder: nn.Module, part: str) -> list[LoraTarget]:
    """The norms of a CLIP text encoder, `from_file`."""
    from torch import nn

    return [
        LoraTarget(lora_key(part, public_name(path)), part, (path,), optional=True, from_file=True, norm=True)
        for path, module in text_encoder.named_modules()
        if isinstance(module, nn.LayerNorm)
    ]


def layers(model: nn.Module, containers: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(class name of the container, path of a Linear or Conv2d below it), each path once, in the model's order."""
    from torch import nn

    return _inside(model, containers, (nn.Linear, nn.Conv2d))


def norms(model: nn.Module, containers: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(class name of the container, path of a layer norm or group norm with weights below it)."""
    from torch import nn

    found = _inside(model, containers, (nn.LayerNorm, nn.GroupNorm))
    return ((name, path) for name, path in found if model.get_submodule(path).weight is not None)


def _inside(
    model: nn.Module, containers: tuple[str, ...], kinds: tuple[type[nn.Module], ...]
) -> Iterator[tuple[str, str]]:
    for outer, container in model.named_modules():
        name = type(container).__name__
        if name in containers:
            for inner, layer in container.named_modules():
                if isinstance(layer, kinds):
                    yield name, f"{outer}.{inner}"


def lora_key(part: str, path: str) -> str:
    """The key of a layer in LoRA files."""
    return f"lora_{part}_{path.replace('.', '_')}"
