"""Dropouts of LoRA layers. References: the closed form of the change, and the statistics of many draws."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from library.types import LoraTarget, Models
from tests.networks.builders import lora


def one_linear(**options):
    """A model of one linear layer, and a network on it that changes its output."""
    torch.manual_seed(0)
    models = Models(nn.Sequential(OrderedDict(layer=nn.Linear(64, 32, bias=False))), {}, {}, None)
    settings = {"dim": 8, "alpha": 8, "dropout": None, "args": {}, "seed": 11, **options}
    network = lora.create([LoraTarget("k", "denoiser", ("layer",))], models, **settings)
    nn.init.normal_(network.k.lora_up.weight)
    network.attach(models)
    return models.denoiser, network


def changes(denoiser, network, x):
    """(in training, in evaluation) what the network adds."""
    network.train()
    trained = denoiser(x)
    network.eval()
    evaluated = denoiser(x)
    network.set_multiplier(0)
    base = denoiser(x)
    network.set_multiplier(1)
    return trained - base, evaluated - base


@pytest.mark.parametrize("options", [{"dropout": 0.4}, {"args": {"dropout": "0.4"}, "dropout": 0.9}])
def test_neuron_dropout_acts_in_training_only_and_keeps_the_mean(options):
    denoiser, network = one_linear(**options)
    x = torch.randn(1, 64).expand(20000, 64)
    trained, evaluated = changes(denoiser, network, x)
    expected = network.k.lora_up.weight @ network.k.lora_down.weight @ x[0]
    torch.testing.assert_close(evaluated[0], expected, rtol=1e-4, atol=1e-5)
    assert trained.std(0).max() > 0.1
    torch.testing.assert_close(trained.mean(0), expected, rtol=0, atol=0.05)  # 20000 draws: standard error < 0.01


def test_rank_dropout_drops_ranks_of_whole_samples():
    denoiser, network = one_linear(args={"rank_dropout": "0.25"})
    x = torch.randn(1, 1, 64).expand(4000, 5, 64)
    trained, _ = changes(denoiser, network, x)
    assert (trained - trained[:, :1]).abs().max() < 1e-4  # one mask for all places of a sample
    hidden = torch.linalg.lstsq(network.k.lora_up.weight, trained[:, 0].T).solution.T
    full = network.k.lora_down.weight @ x[0, 0]
    ratio = hidden / full
    kept = ratio > 0.5
    torch.testing.assert_close(ratio, kept.float() / 0.75, rtol=0, atol=1e-2)
    assert abs(kept.float().mean() - 0.75) < 0.02


def test_module_dropout_drops_all_or_nothing():
    denoiser, network = one_linear(args={"module_dropout": "0.5"})
    x = torch.randn(3, 64)
    outcomes = []
    for _ in range(60):
        trained, evaluated = changes(denoiser, network, x)
        whole = torch.allclose(trained, evaluated, atol=1e-6)
        assert whole or not trained.any()
        outcomes.append(whole)
    assert 10 < sum(outcomes) < 50


def test_rank_dropout_of_convolutions(models, targets, outputs, randomise):
    args = {"conv_dim": "3", "rank_dropout": "0.5"}
    network = randomise(lora.create(targets, models, dim=4, alpha=1, dropout=None, args=args, seed=0))
    network.attach(models)
    network.eval()
    still = outputs(models)[0]
    assert torch.equal(still, outputs(models)[0])
    network.train()
    assert not torch.allclose(outputs(models)[0], still)
