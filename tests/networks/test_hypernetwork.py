"""Hypernetworks: against attention that is written out by hand, and their files. Small contexts, float32."""

from __future__ import annotations

import copy
from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.families.sd.targets import unet_targets
from library.methods.network_spec import check_options, with_file_format
from library.options.network import NetworkOptions
from library.options.saving import SavingOptions
from library.registry import FAMILIES
from library.types import Models
from networks.hypernetwork import MODULE
from tests.builders.hypernetworks import with_hypernetwork
from tests.builders.options import options_for, options_with

BUILDER = MODULE.builder(MODULE)
# Arguments, and where the web UI's loader looks for linear layers and norms.
SHAPES = {
    "default": ({}, [("Linear", 0), ("Linear", 1)]),
    "relu": ({"activation_func": "relu"}, [("Linear", 0), ("Linear", 2)]),
    "deep": (
        {"layer_structure": "[1, 2, 0.5, 1]", "activation_func": "Swish", "add_layer_norm": "True"},
        [("Linear", 0), ("LayerNorm", 2), ("Linear", 3), ("LayerNorm", 5), ("Linear", 6), ("LayerNorm", 7)],
    ),
    "mish": ({"activation_func": "mish", "dropout": "0.5"}, [("Linear", 0), ("Linear", 2)]),
}


@pytest.fixture
def targets(models):
    return unet_targets(models.denoiser)


def made(targets, models, args=None, seed=0):
    """A network with values that change the outputs, attached."""
    network = BUILDER.create(targets, models, dim=4, alpha=1, args=args or {}, seed=seed)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=rng)
    network.attach(models)
    return network.eval()


def content_of(network, **metadata):
    return network.torch_content(network.file_state(), "a", metadata)


@pytest.mark.rows("R9")
@pytest.mark.parametrize("multiplier", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_what_its_file_says(models, targets, outputs, shape, multiplier):
    bare, unet = outputs(models)[0], copy.deepcopy(models.denoiser)
    network = made(targets, models, SHAPES[shape][0])
    network.set_multiplier(multiplier)
    result = outputs(models)[0]
    by_hand = with_hypernetwork(unet, content_of(network), multiplier)
    expected = outputs(Models(by_hand, models.text_encoders, {}, None))[0]
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    if multiplier:
        assert (result - bare).abs().max() > 1e-2
    else:
        assert torch.equal(result, bare)


def test_a_new_one_changes_nothing_and_follows_the_seed(models, targets, outputs):
    bare = outputs(models)[0]
    one, other = (BUILDER.create(targets, models, dim=4, alpha=1, args={}, seed=seed) for seed in (1, 1))
    different = BUILDER.create(targets, models, dim=4, alpha=1, args={}, seed=2)
    states = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in (one, other, different)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["16.0.linear.0.weight"], states[2]["16.0.linear.0.weight"])
    assert not torch.equal(states[0]["16.0.linear.0.weight"], states[0]["16.1.linear.0.weight"])
    one.attach(models)
    assert torch.equal(outputs(models)[0], bare)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_file_has_what_the_loaders_of_others_need(models, targets, tmp_path, shape):
    """AUTOMATIC1111's makes a Sequential by the facts and loads each state dict strictly; ComfyUI's goes by order."""
    args, places = SHAPES[shape]
    network = made(targets, models, args)
    metadata = {"ss_steps": "7", "ss_sd_model_name": "m.ckpt", "ss_new_sd_model_hash": "0123456789abcdef"}
    torch.save(content_of(network, **metadata), tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert [key for key in content if isinstance(key, int)] == [16, 32]
    structure = content["layer_structure"]
    for width in (16, 32):
        for state in content[width]:
            sides = [int(width * factor) for factor in structure]
            stages = OrderedDict()
            linears = pairwise(sides)
            for kind, number in places:
                if kind == "Linear":
                    inner, outer = next(linears)
                stages[str(number)] = nn.Linear(inner, outer) if kind == "Linear" else nn.LayerNorm(outer)
            nn.ModuleDict({"linear": nn.ModuleDict(stages)}).load_state_dict(state)
            assert list(state) == [f"linear.{n}.{end}" for _, n in places for end in ("weight", "bias")]
    facts = {key: value for key, value in content.items() if isinstance(key, str)}
    assert facts == {
        "step": 7,
        "name": "a",
        "sd_checkpoint": "0123456789",
        "sd_checkpoint_name": "m.ckpt",
        "layer_structure": [1, 2, 0.5, 1] if shape == "deep" else [1, 2, 1],
        "activation_func": args.get("activation_func", "linear").lower(),
        "is_layer_norm": shape == "deep",
        "weight_initialization": "Normal",
        "activate_output": False,
        "use_dropout": False,
        "last_layer_dropout": False,
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_is_continued(models, targets, tmp_path, shape):
    args = SHAPES[shape][0]
    network = made(targets, models, args)
    torch.save(content_of(network), tmp_path / "a.pt")
    file = BUILDER.read(tmp_path / "a.pt")
    again = BUILDER.from_weights(targets, models, file, args={"dropout": "0.25"})
    asked = BUILDER.create(targets, models, dim=4, alpha=1, args={**args, "enable_sizes": "16"}, seed=5)
    assert BUILDER.load(asked, file) == (1, 0, 1)
    for other in (again, asked):
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, network.state_dict()[name]), name
    assert {one.dropout for one in again.networks()} == {0.25}
    assert again.counts() == {"denoiser": 4 * 2 * 2}  # transformers, attention layers, projections
    assert content_of(again).keys() == content_of(network).keys()


def test_dropout_is_of_training_alone(models, targets, outputs):
    network = made(targets, models, {"dropout": "0.5"})
    fixed = outputs(models)[0]
    network.train()
    assert not torch.equal(outputs(models)[0], fixed)
    network.eval()
    assert torch.equal(outputs(models)[0], fixed)


def test_files_of_others(models, targets, tmp_path):
    """The oldest names, and numbers among which dropouts count; with no facts, or those of the web UI."""
    network = made(targets, models)
    own = network.state_dict()
    old = {
        width: tuple(
            {
                f"linear{number + 1}.{end}": own[f"{width}.{side}.linear.{number}.{end}"].half()
                for number in (0, 1)
                for end in ("bias", "weight")
            }
            for side in (0, 1)
        )
        for width in (16, 32)
    }
    torch.save(old, tmp_path / "old.pt")
    again = BUILDER.from_weights(targets, models, BUILDER.read(tmp_path / "old.pt"), args={})
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, own[name].half().float())
    state = {"linear.0.weight": torch.ones(32, 16), "linear.0.bias": torch.ones(32)}
    state |= {"linear.10.weight": torch.ones(16, 32), "linear.10.bias": torch.ones(16)}
    facts = {"activation_func": "relu", "use_dropout": True, "layer_structure": [1, 2, 1]}
    torch.save({16: (state, state), **facts}, tmp_path / "web.pt")
    again = BUILDER.from_weights(targets, models, BUILDER.read(tmp_path / "web.pt"), args={})
    assert again.args.activate_output  # the web UI's default where a file says nothing
    assert list(again.layers()) == ["16"]
    assert content_of(again)[16][0].keys() == {f"linear.{n}.{end}" for n in (0, 2) for end in ("weight", "bias")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({16: [{}, {}], "activation_func": "gelu"}, "its activation_func is 'gelu'; linear, relu"),
        ({16: [{}, {}], "layer_structure": "x"}, "its layer_structure is no list of numbers"),
        ({16: [{}, {}]}, "a.pt: 16: has layers of no kind, and not of 32x16, 16x32"),
        ({7: [{}, {}]}, "is for inputs of width 7; attention here has other ones"),
        (
            {16: [{}, {}], "activation_func": "relu", "activate_output": False},
            "is a hypernetwork of .*relu, and not of",
        ),
        ({"a.lora_down.weight": torch.zeros(2, 2)}, "is no hypernetwork"),
        ({16: [{}]}, "is no hypernetwork"),
    ],
)
def test_files_that_do_not_fit(models, targets, tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    network = BUILDER.create(targets, models, dim=4, alpha=1, args={}, seed=0)
    with pytest.raises(UserError, match=message):
        BUILDER.load(network, BUILDER.read(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"layer_structure": "1,2"}, "layer_structure=1,2: must begin and end with 1"),
        ({"layer_structure": "1,900,1"}, "is no list of numbers above 0 and up to 64"),
        ({"activation_func": "gelu"}, "activation_func=gelu: is none of linear, relu"),
        ({"enable_sizes": "1.5"}, "is no list of whole numbers above 0"),
        ({"dropout": "1"}, "dropout=1: must be at least 0, below 1"),
    ],
)
def test_arguments_that_are_refused(args, message):
    with pytest.raises(UserError, match=message):
        MODULE.parse(args)


def test_widths_may_be_chosen(models, targets, caplog):
    network = BUILDER.create(targets, models, dim=4, alpha=1, args={"enable_sizes": "[16, 768]"}, seed=0)
    assert list(network.layers()) == ["16"]
    assert "no attention layer here takes inputs of width 768; there are 16, 32" in caplog.text
    with pytest.raises(UserError, match="leaves no width to train; there are 16, 32"):
        BUILDER.create(targets, models, dim=4, alpha=1, args={"enable_sizes": "768"}, seed=0)
    with pytest.raises(UserError, match="acts on the U-Net"):
        BUILDER.create([], models, dim=4, alpha=1, args={}, seed=0)


# ---- before a model is read


@pytest.mark.rows("R9")
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "sd"])
def test_families_without_hypernetworks_are_refused(family):
    opts = options_for(family, "network", network_module="networks.hypernetwork")
    (problem,) = check_options(opts, FAMILIES[family].traits)
    assert problem.startswith("--network_module: networks.hypernetwork is for Stable Diffusion 1.x and 2.x")
    assert problem.endswith(FAMILIES[family].traits.label)


def network_options(**given):
    return options_with(NetworkOptions, SavingOptions, network_module="networks.hypernetwork", **given)


def test_what_has_no_effect_and_what_cannot_be(tmp_path, caplog):
    torch.save({16: [{}, {}]}, tmp_path / "hyper.pt")
    torch.save({"lora_unet_a.alpha": torch.zeros(())}, tmp_path / "lora.pt")
    hyper, lora = str(tmp_path / "hyper.pt"), str(tmp_path / "lora.pt")
    traits = FAMILIES["sd"].traits
    given = {"network_dim": 8, "network_args": ["rank=3", "add_layer_norm=1"], "network_weights": hyper}
    assert check_options(network_options(**given, dim_from_weights=True), traits) == []
    assert [record.getMessage() for record in caplog.records] == [
        "--network_dim: has no effect in networks.hypernetwork",
        "--network_args: add_layer_norm has no effect with --dim_from_weights",
        "--network_args: rank is ignored: networks.hypernetwork knows no such argument",
    ]
    wrong = {"network_train_text_encoder_only": True, "scale_weight_norms": 1.0, "network_weights": lora}
    problems = check_options(network_options(**wrong), traits)
    assert [problem.partition(":")[0] for problem in problems] == [
        "--network_train_text_encoder_only",
        "--scale_weight_norms",
        "--network_weights",
    ]
    (problem,) = check_options(network_options(base_weights=[hyper]), traits)
    assert problem.startswith(f"--base_weights: {hyper}: this is a hypernetwork")
    given = {"network_module": "networks.lora", "network_weights": hyper}
    (problem,) = check_options(options_with(NetworkOptions, SavingOptions, **given), traits)
    assert problem.startswith(f"--network_weights: {hyper} is a hypernetwork; --network_module=networks.hypernetwork")
    (tmp_path / "broken.pt").write_bytes(b"x")
    (problem,) = check_options(network_options(network_weights=str(tmp_path / "broken.pt")), traits)
    assert "broken.pt" in problem


@pytest.mark.parametrize(
    ("given", "said"), [({}, False), ({"save_model_as": "safetensors"}, True), ({"save_model_as": "pt"}, False)]
)
def test_files_are_pt_files(given, said, caplog):
    opts = with_file_format(network_options(**given))
    assert opts.saving.save_model_as == "pt"
    assert ("--save_model_as: has no effect: networks.hypernetwork saves .pt files only" in caplog.text) == said
    other = options_with(NetworkOptions, SavingOptions, network_module="networks.lora", **given)
    assert with_file_format(other) is other
