"""Every type of layer under autocast, and on a base in bfloat16: outputs and gradients are those of float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from networks.layer_args import ChangeArgs, KohyaOftArgs, LoraArgs, OftArgs
from networks.layers.full import FullLayer
from networks.layers.locon import LoconLayer
from networks.layers.loha import LohaLayer
from networks.layers.lokr import LokrLayer
from networks.layers.lora import LoraLayer
from networks.layers.oft import BoftLayer, OftLayer
from networks.layers.scaled import GloraLayer, Ia3Layer

CASES = {
    "lora": (LoraLayer, 2, LoraArgs()),
    "loha": (LohaLayer, 2, ChangeArgs()),
    "loha whose change is formed": (LohaLayer, 9, ChangeArgs()),
    "lokr": (LokrLayer, 2, ChangeArgs(factor=4)),
    "lokr with a full matrix": (LokrLayer, 2, ChangeArgs(full_matrix=True, factor=4)),
    **{
        f"dora of {side}, {kind.__name__}": (kind, 2, ChangeArgs(factor=4, dora_wd=True, wd_on_output=side == "rows"))
        for kind in (LoconLayer, LohaLayer, LokrLayer)
        for side in ("rows", "columns")
    },
    "oft": (OftLayer, 4, KohyaOftArgs()),
    "diag-oft": (OftLayer, 4, OftArgs(rescaled=True)),
    "boft": (BoftLayer, 18, OftArgs()),
    "glora": (GloraLayer, 2, ChangeArgs()),
    "ia3": (Ia3Layer, 1, ChangeArgs()),
    "full": (FullLayer, 1, ChangeArgs()),
}


def trained_step(name, module, x, *, autocast):
    """The change of the outputs in a step, and the gradients of what is trained and of the input."""
    kind, rank, args = CASES[name]
    layer = kind.build([module], rank, 1.0, args)
    layer.init_weights(torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.2)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = module(x)
        adapted = layer.adapt(0, x, output)
    assert adapted.dtype == output.dtype
    adapted.float().square().mean().backward()
    return [adapted.detach() - output.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_fewer_bits_give_the_same_direction(name, base, autocast):
    torch.manual_seed(0)
    module = nn.Linear(16, 36).to(base).requires_grad_(False)
    x = torch.randn(3, 40, 16).to(base)
    lower = trained_step(name, module, x, autocast=autocast)
    exact = trained_step(name, copy.deepcopy(module).float(), x.float(), autocast=False)
    for ours, reference in zip(lower, exact, strict=True):
        angle = nn.functional.cosine_similarity(ours.float().flatten(), reference.flatten(), dim=0)
        assert angle > 0.995  # bfloat16 has 8 bits
