"""networks.dylora and networks.lora_fa. References: closed formulas, and networks.lora reading their files."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from library.errors import UserError
from library.types import LoraTarget, Models
from tests.networks.builders import dylora, lora, lora_fa

CONV = {"conv_dim": "4"}
KINDS = [dylora, lora_fa]


def make(module, targets, models, *, dim=4, alpha=2.0, dropout=None, args=None, seed=11):
    return module.create(targets, models, dim=dim, alpha=alpha, dropout=dropout, args=args or {}, seed=seed)


def trained(network):
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_up" in name or "lora_B" in name:
                parameter.normal_(0, 0.3, generator=rng)
    return network


def write(network, path):
    save_file({name: tensor.detach().clone() for name, tensor in network.file_state().items()}, path)
    return path


@pytest.mark.parametrize("module", KINDS)
def test_the_file_is_that_of_lora(module, models, targets, outputs, tmp_path):
    other = copy.deepcopy(models)
    network = trained(make(module, targets, models, args=CONV))
    plain = make(lora, targets, models, args={"conv_dim": "4", "conv_alpha": "2"})
    like = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert {name: tensor.shape for name, tensor in network.file_state().items()} == like
    network.attach(models)
    network.eval()
    bare = outputs(other)
    read = lora.read(write(network, tmp_path / "a.safetensors"))
    lora.from_weights(targets, other, read, dropout=None, args={}).attach(other)
    for ours, theirs, plain_output in zip(outputs(models), outputs(other), bare, strict=True):
        assert (ours - theirs).abs().max() < 1e-5  # float32, other order of sums
        assert (ours - plain_output).abs().max() > 1e-2


@pytest.mark.parametrize("module", KINDS)
def test_files_are_read_again(module, models, targets, outputs, tmp_path):
    network = trained(make(module, targets, models))
    file = module.read(write(network, tmp_path / "a.safetensors"))
    again = make(module, targets, models, seed=12, alpha=1.0)
    assert module.load(again, file) == (len(network.layers()), 0, 0)
    built = module.from_weights(targets, models, file, dropout=None, args={})
    for one in (again, built):
        assert one.ranks() == {4}
        assert all(torch.equal(value, network.file_state()[name]) for name, value in one.file_state().items())
    with pytest.raises(UserError, match="the file's rank is 4"):
        module.load(make(module, targets, models, dim=2), file)


@pytest.mark.parametrize("module", KINDS)
def test_state_dicts_are_whole(module, models, targets):
    network = trained(make(module, targets, models))
    again = make(module, targets, models, seed=12, alpha=1.0)
    again.load_state_dict(network.state_dict())
    assert all(torch.equal(value, network.file_state()[name]) for name, value in again.file_state().items())
    assert {layer.scale for layer in again.layers().values()} == {0.5}


@pytest.mark.parametrize("module", KINDS)
def test_norms_are_limited(module, models, targets):
    network = trained(make(module, targets, models))
    down = {key: layer.file_state()["lora_down.weight"].clone() for key, layer in network.layers().items()}
    network.limit_norms(0.5)
    for key, layer in network.layers().items():
        state = layer.file_state()
        norm = (layer.scale * state["lora_up.weight"].flatten(1) @ state["lora_down.weight"].flatten(1)).norm()
        assert norm <= 0.5 * (1 + 1e-5)
        assert module is not lora_fa or torch.equal(state["lora_down.weight"], down[key])


# ---- DyLoRA


def one_layer(module, layer, **options):
    models = Models(layer, {}, {}, None)
    return make(module, [LoraTarget("lora_unet_q", "denoiser", ("q",))], models, **options), models


class One(nn.Module):
    def __init__(self, q):
        super().__init__()
        self.q = q


@pytest.mark.parametrize("unit", [1, 2, 6])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_step_of_dylora_trains_one_block_on_top_of_those_below(unit, kind):
    rank, alpha = 6, 3.0
    q = nn.Linear(5, 7) if kind == "linear" else nn.Conv2d(5, 7, 3, stride=2, padding=1)
    x = torch.randn(4, 5) if kind == "linear" else torch.randn(4, 5, 8, 8)
    args = {"unit": str(unit), "conv_dim": "6"}
    network, models = one_layer(dylora, One(q), dim=rank, alpha=alpha, args=args)
    trained(network).train()
    bare = q(x)
    network.attach(models)
    layer, seen = network.layers()["lora_unet_q"], set()
    state = layer.file_state()
    down, up = state["lora_down.weight"], state["lora_up.weight"]
    for seed in range(40):
        network.zero_grad()
        torch.manual_seed(seed)
        output = q(x)
        output.square().sum().backward()
        (block,) = [index for index, part in enumerate(layer.lora_A) if part.grad is not None]
        assert [index for index, part in enumerate(layer.lora_B) if part.grad is not None] == [block]
        seen.add(block)
        n = (block + 1) * unit
        weight = torch.einsum("or,r...->o...", up.flatten(1)[:, :n], down[:n]) * alpha / rank * math.sqrt(rank / n)
        change = x @ weight.T if kind == "linear" else nn.functional.conv2d(x, weight, stride=2, padding=1)
        torch.testing.assert_close(output, bare + change, rtol=1e-4, atol=1e-5)
    assert seen == set(range(rank // unit))


def test_dylora_refuses_fused_layers():
    models = Models(nn.ModuleDict({name: nn.Linear(5, 7) for name in ("q", "k")}), {}, {}, None)
    with pytest.raises(UserError, match=r"networks\.dylora cannot adapt this model: it has fused layers"):
        make(dylora, [LoraTarget("lora_unet_qk", "denoiser", ("q", "k"))], models)


@pytest.mark.parametrize("autocast", [False, True])
def test_dylora_on_a_base_in_fewer_bits(autocast):
    q = nn.Linear(5, 7).bfloat16()
    network, models = one_layer(dylora, One(q), dim=3)
    trained(network).eval()
    x, exact = torch.randn(4, 5).bfloat16(), copy.deepcopy(q).float()
    bare = exact(x.float())
    network.attach(models)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = q(x)
    state = network.layers()["lora_unet_q"].file_state()
    expected = bare + x.float() @ (state["lora_up.weight"] @ state["lora_down.weight"] * 2 / 3).T
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.03, atol=0.03)  # bfloat16 has 8 bits


def test_an_optimizer_leaves_the_other_blocks_as_they_were():
    network, models = one_layer(dylora, One(nn.Linear(5, 7)), dim=3)
    trained(network).train().attach(models)
    layer = network.layers()["lora_unet_q"]
    optimizer = torch.optim.AdamW(network.parameter_groups({"denoiser": 1e-2}), weight_decay=0.1)
    for seed in range(5):
        before = [part.detach().clone() for part in layer.lora_A]
        torch.manual_seed(seed)
        models.denoiser.q(torch.ones(2, 5)).sum().backward()
        (block,) = [index for index, part in enumerate(layer.lora_A) if part.grad is not None]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        changed = [not torch.equal(a, b) for a, b in zip(before, layer.lora_A, strict=True)]
        assert changed == [index == block for index in range(3)]


@pytest.mark.rows("R293")
def test_lora_plus_in_dylora(models, targets):
    args = {"loraplus_lr_ratio": "4", "loraplus_text_encoder_lr_ratio": "8"}
    network = make(dylora, targets, models, args=args)
    groups = {g["name"]: g for g in network.parameter_groups({"te": 1e-3, "denoiser": 1e-4})}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "textencoder": 1e-3,
        "textencoder plus": pytest.approx(8e-3),
        "unet": 1e-4,
        "unet plus": pytest.approx(4e-4),
    }
    fast = {id(p) for name in ("textencoder plus", "unet plus") for p in groups[name]["params"]}
    assert fast == {id(p) for name, p in network.named_parameters() if "lora_B" in name}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"args": {"unit": "3"}}, "unit=3: does not divide the rank, 4"),
        ({"args": {"conv_dim": "2"}}, "conv_dim=2: must be --network_dim, 4"),
        ({"args": {"unit": "0"}}, "unit=0: must be at least 1"),
        ({"args": {"unit": "9" * 30}}, "must be at least 1, at most 32768"),
        ({"args": {"conv_dim": "-4"}}, "conv_dim=-4: must be at least 0, at most 32768"),
        ({"args": {"conv_dim": "9" * 30}}, "must be at least 0, at most 32768"),
    ],
)
def test_what_dylora_refuses(models, targets, given, message):
    with pytest.raises(UserError, match=message):
        make(dylora, targets, models, **given)


# ---- LoRA-FA


def test_lora_fa_trains_the_up_side_only(models, targets):
    network = make(lora_fa, targets, models)
    groups = network.parameter_groups({"te": 1e-3, "denoiser": 1e-4})
    given = {id(p) for group in groups for p in group["params"]}
    assert given == {id(p) for name, p in network.named_parameters() if "lora_up" in name}


def test_lora_fa_starts_from_normal_values():
    network, _ = one_layer(lora_fa, One(nn.Linear(200, 7)), dim=64)
    down = network.layers()["lora_unet_q"].lora_down.weight.detach()
    assert down.std() == pytest.approx(math.sqrt(2 / 264), rel=0.05)  # 12800 values
    assert down.abs().max() > 3 * math.sqrt(2 / 264)  # a uniform distribution of this deviation ends at 1.73
    assert not network.layers()["lora_unet_q"].lora_up.weight.any()


def test_arguments_are_known_without_a_model():
    assert lora_fa.module.check({"conv_alpha": "1"}, dim=4, ranks_from_file=False) == [
        "--network_args: conv_alpha has no effect without conv_dim or conv_block_dims"
    ]
    assert lora_fa.module.check({"loraplus_lr_ratio": "2"}, dim=4, ranks_from_file=False) == [
        "--network_args: loraplus_lr_ratio is ignored: networks.lora_fa knows no such argument"
    ]
    assert "conv_alpha has no effect" in dylora.module.check({"conv_alpha": "1"}, dim=4, ranks_from_file=False)[0]
    assert dylora.module.check({"unit": "2"}, dim=4, ranks_from_file=False) == []
    (line,) = dylora.module.check({}, 0.1, dim=4, ranks_from_file=False)
    assert line == "--network_dropout has no effect in networks.dylora"
    with pytest.raises(UserError, match="conv_dim=1: must be --network_dim, 8"):
        dylora.module.check({"conv_dim": "1"}, dim=8, ranks_from_file=False)
