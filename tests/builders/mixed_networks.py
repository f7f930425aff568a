"""Networks of every type at once on a model: one type after the other, layer by layer, with values that change it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import networks.lora
import networks.lora_flux
import networks.lora_sd3
import networks.lycoris
import networks.oft
import networks.oft_flux
from library.types import LoraTarget, Models
from networks.build import DeclaredBuilder
from networks.network import Network
from networks.targets import live_modules

LORA = {"sd": networks.lora, "sdxl": networks.lora, "flux": networks.lora_flux, "sd3": networks.lora_sd3}
OFT = {"sd": networks.oft, "sdxl": networks.oft, "flux": networks.oft_flux, "sd3": None}
LYCORIS = (
    {"algo": "lora", "conv_dim": "2"},
    {"algo": "lora", "conv_dim": "2", "dora_wd": "True"},
    {"algo": "loha", "conv_dim": "2", "use_tucker": "True"},
    {"algo": "lokr", "conv_dim": "2", "factor": "4"},
    {"algo": "full"},
    {"algo": "ia3", "preset": "full"},
    {"algo": "glora"},
    {"algo": "diag-oft", "rescaled": "True"},
    {"algo": "boft"},
)


def attached_networks(family: str, targets: Sequence[LoraTarget], models: Models) -> list[Network]:
    """Networks that share the layers among them. They are attached; `file_of` is their file."""
    norms = [target for target in targets if target.norm]
    layers = [target for target in targets if not target.norm]
    kinds = [(LORA[family], {"conv_dim": "2"} if family in ("sd", "sdxl") else {})]
    kinds += [(networks.lycoris, args) for args in LYCORIS]
    if OFT[family]:
        kinds.append((OFT[family], {"enable_all_linear": "True"}))
    made = []
    for number, (module, args) in enumerate(kinds):
        own = layers[number :: len(kinds)]
        if args.get("algo") == "full" and norms:
            own, args = own + norms, {**args, "train_norm": "True"}
        if module is OFT[family]:
            own = [target for target in own if target.part == "denoiser"]
        dim = 16 if args.get("algo") == "boft" else 4  # the largest size of a block, of which 2^n make a layer's rows
        network = DeclaredBuilder(module.MODULE).create(own, models, dim=dim, alpha=2.0, args=args, seed=number)
        rng = torch.Generator().manual_seed(number)
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
        network.attach(models)
        made.append(network)
    return made


def file_of(made: Sequence[Network]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for network in made for name, tensor in network.file_state().items()}


def layer_outputs(models: Models, targets: Sequence[LoraTarget]) -> dict[str, list[Tensor]]:
    """What each layer's modules give for some input."""
    outputs = {}
    for target in targets:
        outputs[target.key] = [module(input_of(module)) for module in live_modules(models, target)]
    return outputs


def input_of(module: nn.Module) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Conv2d):
        return torch.randn(1, module.in_channels, 6, 6, generator=rng)
    if isinstance(module, nn.GroupNorm):
        return torch.randn(1, module.num_channels, 4, 4, generator=rng)
    width = module.in_features if isinstance(module, nn.Linear) else module.normalized_shape[0]
    return torch.randn(3, width, generator=rng)
