"""Hooks on live modules. Reference: the same modules with the change merged into their weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from library.types import LoraTarget, Models
from networks import build
from networks.layers.functional import delta
from networks.targets import add_to_weights
from tests.networks.builders import dylora, lora, lora_fa


class Attention(nn.Module):
    """Separate q, k, v of different widths, where a file has one fused layer."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 8)

    def forward(self, x):
        return torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], dim=-1)


FUSED = LoraTarget("lora_unet_qkv", "denoiser", ("to_q", "to_k", "to_v"))


def network_on(denoiser, targets, **kwargs):
    models = Models(denoiser, {}, {}, None)
    options = {"dim": 2, "alpha": 1.0, "dropout": None, "args": {}, "seed": 3, **kwargs}
    return models, lora.create(targets, models, **options)


def test_fused_layer_shares_down_and_cuts_up_by_rows(randomise):
    denoiser, x = Attention(), torch.randn(3, 5, 6)
    models, network = network_on(denoiser, [FUSED])
    randomise(network)
    state = network.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "lora_unet_qkv.alpha": (),
        "lora_unet_qkv.lora_down.weight": (2, 6),
        "lora_unet_qkv.lora_up.weight": (16, 2),
    }
    change = state["lora_unet_qkv.lora_up.weight"] @ state["lora_unet_qkv.lora_down.weight"] * 0.5
    weight = torch.cat([denoiser.to_q.weight, denoiser.to_k.weight, denoiser.to_v.weight])
    bias = torch.cat([denoiser.to_q.bias, denoiser.to_k.bias, denoiser.to_v.bias])
    expected = x @ (weight + change).T + bias
    network.attach(models)
    torch.testing.assert_close(denoiser(x), expected, rtol=1e-5, atol=1e-6)

    network.detach()
    add_to_weights(models, FUSED, change)
    torch.testing.assert_close(denoiser(x), expected, rtol=1e-5, atol=1e-6)


class Modulation(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("module", [lora, lora_fa, dylora])
def test_halves_that_a_file_has_the_other_way_round(module, randomise):
    denoiser, x = Modulation(), torch.randn(2, 3, 6)
    models, target = Models(denoiser, {}, {}, None), LoraTarget("k", "denoiser", ("linear",), swap_halves=True)
    network = module.create([target], models, dim=2, alpha=1.0, dropout=None, args={}, seed=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(len(parameter)))
    state = network.eval().file_state()
    change = state["k.lora_up.weight"] @ state["k.lora_down.weight"] * 0.5
    expected = denoiser(x) + x @ torch.cat([change[4:], change[:4]]).T
    network.attach(models)
    torch.testing.assert_close(denoiser(x), expected, rtol=1e-5, atol=1e-5)
    network.detach()
    add_to_weights(models, target, change)
    torch.testing.assert_close(denoiser(x), expected, rtol=1e-5, atol=1e-5)


def test_optional_targets_are_left_out_until_a_file_has_them(tmp_path):
    models = Models(Attention(), {}, {}, None)
    targets = [LoraTarget("q", "denoiser", ("to_q",)), LoraTarget("k", "denoiser", ("to_k",), optional=True)]
    for module in (lora, lora_fa, dylora):
        network = module.create(targets, models, dim=2, alpha=1.0, dropout=None, args={}, seed=3)
        assert list(network.layers()) == ["q"]
    both = lora.create(
        [replace(t, optional=False) for t in targets], models, dim=2, alpha=1.0, dropout=None, args={}, seed=3
    )
    save_file(both.file_state(), tmp_path / "a.safetensors")
    for module in (lora, lora_fa, dylora):
        file = module.read(tmp_path / "a.safetensors")
        assert list(module.from_weights(targets, models, file, dropout=None, args={}).layers()) == ["q", "k"]
    assert build.merge(targets, models, file, 1.0) == (2, 0)


def test_detach_leaves_nothing_and_the_model_never_holds_the_network(randomise):
    denoiser, x = Attention(), torch.randn(2, 6)
    names, before = list(denoiser.state_dict()), denoiser(x)
    models, network = network_on(denoiser, [FUSED])
    randomise(network).attach(models)
    assert list(denoiser.state_dict()) == names
    assert not torch.allclose(denoiser(x), before)
    with pytest.raises(ValueError, match="attached already"):
        network.attach(models)
    network.detach()
    assert torch.equal(denoiser(x), before)
    network.attach(models)
    assert not torch.allclose(denoiser(x), before)


def test_multiplier_is_linear(randomise):
    denoiser, x = Attention(), torch.randn(2, 6)
    base = denoiser(x)
    models, network = network_on(denoiser, [FUSED])
    randomise(network).attach(models)
    full = denoiser(x) - base
    network.set_multiplier(-0.5)
    torch.testing.assert_close(denoiser(x) - base, -0.5 * full, rtol=1e-4, atol=1e-6)
    network.set_multiplier(0)
    assert torch.equal(denoiser(x), base)


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_base_with_float32_network(base_dtype, autocast, randomise):
    denoiser = Attention().to(base_dtype)
    models, network = network_on(denoiser, [FUSED])
    randomise(network).attach(models)
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = denoiser(x.to(base_dtype))
    assert output.dtype == (torch.bfloat16 if autocast else base_dtype)
    output.float().sum().backward()
    for parameter in network.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().sum() > 0
    denoiser, network = denoiser.float(), network.float()
    torch.testing.assert_close(output.float(), denoiser(x), rtol=0.05, atol=0.05)  # bf16 has 8 bits


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, randomise):
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        denoiser = Attention()
        denoiser.requires_grad_(False)
        models, network = network_on(denoiser, [FUSED], args={"dropout": "0.5", "rank_dropout": "0.3"})
        randomise(network).attach(models)
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
        torch.manual_seed(7)  # the masks of the dropouts, drawn again when the forward is repeated
        y = checkpoint(denoiser, x, use_reentrant=reentrant) if wrapped else denoiser(x)
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(*gradients, strict=True))


def test_compiles_to_one_graph(randomise):
    denoiser, x = Attention(), torch.randn(3, 6)
    models, network = network_on(
        denoiser, [FUSED], args={"dropout": "0.1", "rank_dropout": "0.1", "module_dropout": "0.1"}
    )
    randomise(network).attach(models)
    compiled = torch.compile(denoiser, backend="aot_eager", fullgraph=True)
    network.train()
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    network.eval()
    torch.testing.assert_close(compiled(x), denoiser(x))


def test_limit_norms_touches_only_what_is_too_large(randomise):
    denoiser = Attention()
    targets = [LoraTarget("a", "denoiser", ("to_q",)), LoraTarget("b", "denoiser", ("to_k",))]
    _, network = network_on(denoiser, targets)
    randomise(network)
    with torch.no_grad():
        network.b.lora_up.weight.mul_(1e-3)
    small = {k: v.clone() for k, v in network.b.state_dict().items()}
    network.limit_norms(0.05)
    layer = network.a
    norm = torch.linalg.norm(layer.scale * delta(layer.lora_down.weight, layer.lora_up.weight))
    torch.testing.assert_close(norm, torch.tensor(0.05), rtol=1e-5, atol=0)
    assert all(torch.equal(value, small[name]) for name, value in network.b.state_dict().items())
