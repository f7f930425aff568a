"""Network files that change every layer of a model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

import networks.lycoris
from library.families.registry import FAMILIES
from library.types import LoraTarget, Models
from networks.build import DeclaredBuilder
from networks.network import Network
from tests.builders.options import options_for

TYPES = {
    "lora": {"algo": "lora"},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr", "factor": "4"},
    "dora": {"algo": "lora", "dora_wd": "True"},
}


def targets_of(models: Models, family: str) -> list[LoraTarget]:
    return FAMILIES[family].adapter(options_for(family, "network")).targets.lora(models)


def write_network(models: Models, path: Path, args: dict[str, str], family: str = "sd") -> Network:
    """Writes a file of networks.lycoris, and gives the network that is in it.

    Args: args: its arguments; linear layers of attention and feed-forward unless they have a preset.
    """
    builder = DeclaredBuilder(networks.lycoris.MODULE)
    args = {"preset": "attn-mlp", **args}
    network = builder.create(targets_of(models, family), models, dim=4, alpha=2.0, args=args, seed=3)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    save_file({name: tensor.contiguous() for name, tensor in network.file_state().items()}, path)
    return network.eval()
