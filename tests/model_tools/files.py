"""Network files with random values, as programs write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from networks.files import read
from networks.layers.lora import Entry

# Layers of a small model: a linear one, a 1x1 and a 3x3 convolution, (out, in, ...).
SHAPES = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (12, 10),
    "lora_unet_down_blocks_0_attentions_0_proj_in": (8, 9, 1, 1),
    "lora_unet_down_blocks_1_resnets_0_conv1": (10, 6, 3, 3),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (16, 8),
}
Shapes = Mapping[str, tuple[int, ...]]


def lora_tensors(
    seed: int = 0, *, rank: int = 3, alpha: float | None = 2.0, shapes: Shapes = SHAPES, dora: bool = False
) -> dict[str, Tensor]:
    """A LoRA in kohya's layout. Values are about 0.3, so that what is added up shows."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (out, *rest) in shapes.items():
        tensors[f"{layer}.lora_down.weight"] = torch.randn(rank, *rest, generator=rng) * 0.3
        tensors[f"{layer}.lora_up.weight"] = torch.randn(out, rank, *[1] * (len(rest) - 1), generator=rng) * 0.3
        if alpha is not None:
            tensors[f"{layer}.alpha"] = torch.tensor(float(alpha))
        if dora:
            tensors[f"{layer}.dora_scale"] = torch.rand(out, *[1] * len(rest), generator=rng) + 0.5
    return tensors


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=dict(metadata or {}))
    return str(path)


def changes(path: str | Path) -> dict[str, Tensor]:
    """The change of each layer's weight that a file makes, whatever its layout: (out, in, ...)."""
    found = {}
    for layer, entry in read(path).entries.items():
        found[layer] = Entry.of(entry).change() if "lora_mid.weight" not in entry else _tucker(entry)
    return found


def _tucker(entry: Mapping[str, Tensor]) -> Tensor:
    down, up = entry["lora_down.weight"].flatten(1), entry["lora_up.weight"].flatten(1)
    whole = torch.einsum("op,pqkl,qi->oikl", up, entry["lora_mid.weight"], down)
    return whole * (float(entry["alpha"]) / len(down))


def assert_same_changes(first: Mapping[str, Tensor], second: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Within a share of the largest value of each layer."""
    assert first.keys() == second.keys()
    for layer in first:
        limit = tolerance * float(second[layer].abs().max())
        torch.testing.assert_close(first[layer], second[layer], atol=limit, rtol=0)
