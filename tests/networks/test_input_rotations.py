"""OFT and BOFT of inputs: networks.oft_v2 and networks.boft. References: PEFT's layers and formulas, float32."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import BOFTConfig, OFTConfig, get_peft_model
from peft.tuners.boft.layer import BOFTLayer
from torch import nn

import networks.boft
import networks.oft_v2
from library.errors import UserError
from library.types import LoraTarget, Models
from networks.build import DeclaredBuilder, merge
from networks.file_names import require_types
from networks.files import NetworkFile
from networks.layer_args import InputBoftArgs, InputOftArgs
from networks.layers.input_rotations import InputBoftLayer, InputOftLayer
from networks.layouts import kohya_name
from networks.targets import hook
from tests.networks.test_lycoris_module import make

KINDS = {
    "linear": lambda: nn.Linear(24, 16),
    "linear without bias": lambda: nn.Linear(24, 16, bias=False),
    "convolution": lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1),
    "small convolution": lambda: nn.Conv2d(24, 12, 1),
}
LAYERS = {
    "oft": lambda modules: InputOftLayer(modules, 4, None, InputOftArgs()),
    "oft shared": lambda modules: InputOftLayer(modules, 4, None, InputOftArgs(block_share=True)),
    "coft": lambda modules: InputOftLayer(modules, 4, None, InputOftArgs(coft=True, coft_eps=0.5)),
    "boft": lambda modules: InputBoftLayer(modules, 4, None, InputBoftArgs()),
    "boft of three stages": lambda modules: InputBoftLayer(modules, 2, None, InputBoftArgs(stages=3)),
}


def module_of(kind):
    torch.manual_seed(1)
    return KINDS[kind]().requires_grad_(False)


def moved(layer, strength=0.3):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape) * strength)
    return layer.eval()


def input_for(module):
    torch.manual_seed(3)
    return torch.randn(2, module.in_channels, 6, 5) if isinstance(module, nn.Conv2d) else torch.randn(3, 5, 24)


def files(layer):
    return {name: tensor.clone() for name, tensor in layer.file_state().items()}


class Alone(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.block = nn.ModuleDict({"x": module})

    def forward(self, x):
        return self.block["x"](x)


def peft_model(module, config):
    """PEFT's model of one layer with random values, and these by their names in its files."""
    model = get_peft_model(Alone(copy.deepcopy(module)), config)
    torch.manual_seed(5)
    values = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=float("boft_s" in name), std=0.1)
            values[name.replace(".default", "")] = parameter.detach().clone()
    return model.eval(), values


PEFT = {
    "oft": (OFTConfig(r=0, oft_block_size=4, target_modules=["x"]), InputOftLayer, InputOftArgs()),
    "oft shared": (
        OFTConfig(r=0, oft_block_size=4, block_share=True, target_modules=["x"]),
        InputOftLayer,
        InputOftArgs(),
    ),
    "boft": (BOFTConfig(boft_block_size=4, target_modules=["x"]), InputBoftLayer, InputBoftArgs()),
}


@pytest.mark.rows("R514", "R515")
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "small convolution"])
@pytest.mark.parametrize("name", PEFT)
def test_files_of_peft_mean_what_they_mean_there(name, kind):
    config, layer_class, args = PEFT[name]
    module = module_of(kind)
    model, values = peft_model(module, config)
    x = input_for(module)
    entry = {kohya_name(path).partition(".")[2]: tensor for path, tensor in values.items()}
    require_types("f", values)
    layer = layer_class.rebuild([module], entry, args).eval()
    with torch.no_grad():
        expected = model(x)
    assert all(path.startswith("base_model.model.block.x.") for path in values)
    assert (expected - module(x)).abs().max() > 1e-2
    torch.testing.assert_close(layer.adapt(0, x, module(x)), expected, rtol=1e-4, atol=1e-5)
    models = Models(nn.ModuleDict({"x": copy.deepcopy(module)}), {}, {}, None)
    assert merge([LoraTarget("k", "denoiser", ("x",))], models, NetworkFile("f", {"k": entry}), 1.0) == (1, 0)
    torch.testing.assert_close(models.denoiser.x(x), expected, rtol=1e-4, atol=1e-5)


def test_convolutions_of_other_programs_are_turned_the_other_way():
    """By R, where those of PEFT are by its transpose; linear layers are the same."""
    module = module_of("small convolution")
    _, values = peft_model(module, PEFT["oft"][0])
    (upper,) = values.values()
    ours = InputOftLayer.weight_change({"oft_R.weight": -upper}, module.weight.shape, lambda: module.weight)
    theirs = InputOftLayer.weight_change({"peft_R.weight": upper}, module.weight.shape, lambda: module.weight)
    assert torch.equal(ours, theirs)


def test_stages_are_those_of_the_paper_as_peft_has_them():
    """PEFT makes several stages on GPUs alone, with matrices of its own functions, of which R is made here."""
    width, size, stages = 32, 4, 4
    blocks = torch.randn(stages, width // size, size, size, generator=torch.Generator().manual_seed(4))
    whole = torch.eye(width)
    for stage in range(stages):
        order = BOFTLayer.block_butterfly_perm(None, width, width // size // 2**stage, size // 2, stages - 1)
        permutation = BOFTLayer.perm2mat(None, order)
        own = torch.block_diag(*BOFTLayer.cayley_batch(None, blocks[stage]))
        whole = permutation @ own @ permutation.T @ whole
    weight, scales = torch.randn(16, width), torch.rand(16, 1) + 0.5
    expected = (whole @ weight.T).T * scales
    entry = {"boft_R": blocks, "boft_s": scales}
    change = InputBoftLayer.weight_change(entry, weight.shape, lambda: weight)
    torch.testing.assert_close(weight + change, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_hooks_merged_weights_and_files_are_one(name, kind):
    module = module_of(kind)
    x, layer = input_for(module), moved(LAYERS[name]([module]))
    state, multiplier = files(layer), 0.7
    assert "alpha" not in state
    again = type(layer).rebuild([module], state, layer.args)
    for each in (layer, again):
        each.multiplier = multiplier
    expected = layer.adapt(0, x, module(x))
    assert (expected - module(x)).abs().max() > 1e-2
    torch.testing.assert_close(again.eval().adapt(0, x, module(x)), expected, rtol=1e-5, atol=1e-5)
    whole = copy.deepcopy(module)
    whole.weight += type(layer).merged_change(state, module.weight.shape, lambda: module.weight, multiplier)
    torch.testing.assert_close(whole(x), expected, rtol=1e-4, atol=1e-5)
    layer.multiplier = 0.0
    assert torch.equal(layer.adapt(0, x, module(x)), module(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_training_without_the_bare_output_gives_the_same_gradients(name, kind):
    """In a model in training linear modules get the turned input; `adapt` adds a change to their output."""
    module = module_of(kind)
    layer, x = moved(LAYERS[name]([module])).train(), input_for(module)
    expected = layer.adapt(0, x, module(x))
    expected.square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    hook(Models(nn.ModuleDict({"x": module}), {}, {}, None), LoraTarget("k", "denoiser", ("x",)), layer)
    output = module(x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    output.square().mean().backward()
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_fused_modules_share_the_rotation(name):
    torch.manual_seed(1)
    denoiser = nn.ModuleDict({key: nn.Linear(24, rows) for key, rows in {"q": 8, "k": 8, "v": 12}.items()})
    denoiser.requires_grad_(False)
    layer, x = moved(LAYERS[name](list(denoiser.values()))), input_for(denoiser.q)
    weight = torch.cat([module.weight for module in denoiser.values()])
    change = type(layer).weight_change(files(layer), weight.shape, lambda: weight)
    expected = [
        (module(x) + x @ rows.T) for module, rows in zip(denoiser.values(), change.split([8, 8, 12]), strict=True)
    ]
    hook(Models(denoiser, {}, {}, None), LoraTarget("k", "denoiser", ("q", "k", "v")), layer)
    for module, wanted in zip(denoiser.values(), expected, strict=True):
        torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)


def test_constrained_blocks_stay_within_the_radius():
    args = InputOftArgs(coft=True, coft_eps=0.06)
    layer = moved(InputOftLayer([module_of("linear")], 4, None, args))
    layer.changed(torch.randn(2, 24), of_weight=False)
    norms = layer.weight.detach().norm(dim=1) * 2**0.5  # of Q, which has each value twice
    torch.testing.assert_close(norms, torch.full((6,), 0.06 / 6**0.5))


@pytest.mark.parametrize("name", ["oft", "boft of three stages"])
def test_dropout_leaves_blocks_as_they_are(name):
    module = module_of("linear")
    layer = moved(LAYERS[name]([module]))
    object.__setattr__(layer.args, "dropout", 0.5)
    x = input_for(module)
    torch.manual_seed(1)
    full, dropped = layer.changed(x, of_weight=False), layer.train().changed(x, of_weight=False)
    same = torch.isclose(full, dropped, atol=1e-6).float().mean()
    assert 0 < same < 1 if name == "oft" else same < 1


def test_sizes_of_blocks():
    assert InputOftArgs().size(320, 32) == 32
    assert InputOftArgs().size(24, 5) == 4
    assert InputOftArgs().size(24, 7) == 6  # of two that are as near, the smaller one
    assert InputOftArgs(block_size=8).size(24, 5) == 8
    assert InputOftArgs().size(24, 100) == 24
    assert InputBoftArgs(stages=3).shape(24, 5) == (3, 4, 6)  # neither 4 nor 6 blocks would do for three stages: 4 do
    assert InputBoftArgs(block_num=6).shape(24, 5) == (1, 6, 4)
    for make_shape in (
        lambda: InputOftArgs(auto_adjust=False).size(24, 5),
        lambda: InputBoftArgs(auto_adjust=False, stages=3).shape(24, 4),
        lambda: InputBoftArgs(block_num=5).shape(24, 4),
        lambda: InputBoftArgs(stages=3).shape(15, 4),
    ):
        with pytest.raises(UserError, match="cannot be cut"):
            make_shape()


@pytest.mark.parametrize("broken", ["shape of peft", "stages", "factors"])
def test_files_that_do_not_fit_are_refused(broken):
    module = module_of("linear")
    entry = {
        "shape of peft": {"oft_R.weight": torch.zeros(5, 6)},
        "stages": {"boft_R": torch.zeros(2, 3, 8, 8), "boft_s": torch.ones(16, 1)},
        "factors": {"boft_R": torch.zeros(1, 3, 8, 8), "boft_s": torch.ones(15, 1)},
    }[broken]
    layer = InputOftLayer if "oft_R.weight" in entry else InputBoftLayer
    with pytest.raises(UserError, match="fit"):
        layer.weight_change(entry, module.weight.shape, lambda: module.weight)
    with pytest.raises(UserError, match="fit"):
        layer.rebuild([module], entry, InputOftArgs() if layer is InputOftLayer else InputBoftArgs())


@pytest.mark.parametrize("module", [networks.oft_v2, networks.boft])
def test_which_layers_get_one(models, targets, module):
    builder = DeclaredBuilder(module.MODULE)
    assert builder.usual_dim == {networks.oft_v2: 32, networks.boft: 4}[module]

    def layers(**args):
        return set(make(builder, targets, models, args).layers())

    plain, convs = layers(), layers(enable_conv="True")
    assert plain < convs
    assert any("resnets" in name for name in convs - plain)
    assert not any("resnets" in name for name in plain)
    attention = layers(include_patterns="['.*attn1.*']")
    assert attention == {name for name in plain if "attn1" in name}
    assert layers(exclude_patterns="['.*attn1.*']") == plain - attention
