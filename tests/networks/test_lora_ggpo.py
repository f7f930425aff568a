"""Perturbed LoRA layers against the formula written out with whole matrices."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from networks.layer_args import PerturbedLoraArgs
from networks.layers.lora_ggpo import PerturbedLoraLayer
from tests.networks import dits
from tests.networks.builders import lora_flux

SIGMA, BETA = 0.3, 0.2
ARGS = {"ggpo_sigma": str(SIGMA), "ggpo_beta": str(BETA)}


@pytest.fixture
def layer():
    """On two fused linears, with values, gradients, and a scale other than 1."""
    torch.manual_seed(0)
    modules = [nn.Linear(6, 5), nn.Linear(6, 3)]
    made = PerturbedLoraLayer(modules, 4, 2.0, PerturbedLoraArgs(ggpo_sigma=SIGMA, ggpo_beta=BETA))
    made.bases = tuple(module.weight.detach().clone() for module in modules)
    for weight in (made.lora_down.weight, made.lora_up.weight):
        nn.init.normal_(weight)
        weight.grad = torch.randn_like(weight)
    return made


def test_deviation_is_that_of_the_formula(layer):
    layer.before_step()
    up, down = layer.lora_up.weight.detach(), layer.lora_down.weight.detach()
    gradient = layer.lora_up.weight.grad @ down + up @ layer.lora_down.weight.grad
    change = 2.0 / 4 * up @ down
    for row, base in enumerate(torch.cat(layer.bases)):
        weight = math.sqrt(base.norm() ** 2 + change[row].norm() ** 2)
        wanted = (SIGMA * weight + BETA * gradient[row].norm() ** 2) / math.sqrt(8)
        assert layer.deviation[row].item() == pytest.approx(float(wanted), rel=1e-4)


def test_the_disturbance_is_normal_with_that_deviation(layer):
    """E is the same for all inputs of a pass, so that passing the unit vectors shows it."""
    layer.before_step()
    layer.train()
    x, plain = torch.eye(6), torch.zeros(6, 3)
    seen = []
    for seed in range(400):
        torch.manual_seed(seed)
        noisy = layer.adapt(1, x, plain)
        seen.append((noisy - layer.eval().adapt(1, x, plain)).detach())
        layer.train()
    drawn = torch.stack(seen)  # (pass, in, out)
    assert drawn.mean().abs() < 0.05 * layer.deviation.max()
    assert torch.allclose(drawn.flatten(0, 1).std(0), layer.deviation[5:], rtol=0.08)
    torch.manual_seed(3)
    assert torch.equal(layer.adapt(1, x, plain) - layer.eval().adapt(1, x, plain), seen[3])


def test_nothing_is_disturbed_before_the_first_step_and_where_it_is_used(layer):
    x, plain = torch.randn(2, 3, 6), torch.zeros(2, 3, 5)
    calm = layer.eval().adapt(0, x, plain)
    assert torch.equal(layer.train().adapt(0, x, plain), calm)
    layer.before_step()
    assert not torch.equal(layer.adapt(0, x, plain), calm)
    assert torch.equal(layer.eval().adapt(0, x, plain), calm)


def test_no_gradient_flows_through_the_disturbance(layer):
    x, plain = torch.randn(2, 6), torch.zeros(2, 5)
    layer.before_step()
    gradients = []
    for mode in (True, False):
        layer.train(mode).zero_grad()
        layer.adapt(0, x, plain).sum().backward()
        gradients.append(layer.lora_down.weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("split", [{}, {"split_qkv": "True"}], ids=["fused", "split"])
def test_a_network_keeps_it_in_its_state_and_out_of_its_file(tmp_path, split):
    torch.manual_seed(0)
    models = dits.flux()
    targets = dits.flux_targets(models)

    def make():
        return lora_flux.create(targets, models, dim=2, alpha=1.0, dropout=None, args={**ARGS, **split}, seed=1)

    network = make()
    for weight in network.parameters():
        nn.init.normal_(weight)
        weight.grad = torch.randn_like(weight)
    network.before_step()
    state = network.state_dict()
    deviations = [name for name in state if name.endswith("deviation")]
    assert deviations
    assert all(state[name].gt(0).all() for name in deviations)
    other = make()
    other.load_state_dict(state)
    assert all(torch.equal(other.state_dict()[name], state[name]) for name in state)
    assert not any("deviation" in name for name in network.file_state())
    save_file({name: tensor.clone() for name, tensor in network.file_state().items()}, tmp_path / "lora.safetensors")
    lora_flux.load(make(), lora_flux.read(tmp_path / "lora.safetensors"))
