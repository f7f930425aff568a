"""OFT, BOFT, (IA)^3, GLoRA, whole differences and norms. References: lycoris' layers, float32, and formulas."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.types import LoraTarget, Models
from networks.build import merge
from networks.files import NetworkFile
from networks.layer_args import KohyaOftArgs, LyLoconArgs, NumberedOftArgs, OftArgs, WholeArgs
from networks.layers.full import FullLayer, NormLayer
from networks.layers.oft import BoftLayer, OftLayer
from networks.layers.scaled import GloraLayer, Ia3Layer
from networks.targets import hook

MODULES = {
    "linear": lambda: nn.Linear(12, 24),
    "linear without bias": lambda: nn.Linear(12, 24, bias=False),
    "convolution": lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1),
}
NORMS = {"layer norm": lambda: nn.LayerNorm(12), "group norm": lambda: nn.GroupNorm(4, 8)}
# layer, its arguments, rank; lycoris' module, class, and arguments
CASES = {
    "full": (FullLayer, WholeArgs(), 1, "full", "FullModule", {}),
    "ia3": (Ia3Layer, WholeArgs(), 1, "ia3", "IA3Module", {}),
    "ia3 on inputs": (Ia3Layer, WholeArgs(train_on_input=True), 1, "ia3", "IA3Module", {"train_on_input": True}),
    "glora": (GloraLayer, LyLoconArgs(), 2, "glora", "GLoRAModule", {}),
    "diag-oft": (OftLayer, OftArgs(), 4, "diag_oft", "DiagOFTModule", {}),
    "diag-oft limited": (OftLayer, OftArgs(constraint=0.03), 4, "diag_oft", "DiagOFTModule", {"constraint": 0.03}),
    "diag-oft rescaled": (OftLayer, OftArgs(rescaled=True), 4, "diag_oft", "DiagOFTModule", {"rescaled": True}),
    "boft": (BoftLayer, OftArgs(), 6, "boft", "ButterflyOFTModule", {}),
    "boft rescaled": (BoftLayer, OftArgs(rescaled=True), 6, "boft", "ButterflyOFTModule", {"rescaled": True}),
}
WHOLE = [(name, kind) for name in CASES for kind in MODULES] + [("norm", kind) for kind in NORMS]


def module_of(kind):
    torch.manual_seed(2)
    module = {**MODULES, **NORMS}[kind]()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.requires_grad_(False)


def input_for(module):
    torch.manual_seed(3)
    image = isinstance(module, (nn.Conv2d, nn.GroupNorm))
    return torch.randn(2, 8, 6, 7) if image else torch.randn(4, 5, 12)


def made(name, module):
    """A layer of ours that changes the output, and lycoris' with the same values."""
    if name == "norm":
        layer, theirs = NormLayer.build([module], 1, None, WholeArgs()), lycoris("norms", "NormModule")("x", module)
    else:
        kind, args, rank, file, their_name, given = CASES[name]
        layer = kind.build([module], rank, 2.0, args)
        layer.init_weights(torch.Generator().manual_seed(1))
        theirs = lycoris(file, their_name)("x", module, 1.0, rank, 2.0, **given)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
        own = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
        for name, tensor in layer.file_state().items():
            own[{"diff": "weight", "diff_b": "bias"}.get(name, name)].copy_(tensor)
    return layer, theirs


def lycoris(file, name):
    return getattr(importlib.import_module(f"lycoris.modules.{file}"), name)


def adapted(layer, module, x):
    return layer.adapt(0, x, module(x))


@pytest.mark.parametrize(("name", "kind"), WHOLE)
def test_outputs_and_gradients_are_those_of_lycoris(name, kind):
    module = module_of(kind)
    layer, theirs = made(name, module)
    xs = [input_for(module).requires_grad_(), input_for(module).requires_grad_()]
    ours, reference = adapted(layer, module, xs[0]), theirs(xs[1])
    assert (ours - module(xs[0])).abs().max() > 1e-2
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
    for output in (ours, reference):
        output.square().mean().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-5)
    theirs_by_name = {
        {"weight": "diff", "bias": "diff_b"}.get(own, own) if name == "full" else own: parameter
        for own, parameter in theirs.named_parameters()
    }
    for own, parameter in layer.named_parameters():
        own = {"blocks.0": "oft_blocks", "diffs.0": "diff"}.get(own, own.replace("_weight", ".weight"))
        gradient = theirs_by_name[own].grad.reshape(parameter.shape)
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "kind"), WHOLE)
def test_a_file_gives_the_same_layer_and_the_same_weights(name, kind):
    module = module_of(kind)
    layer, _ = made(name, module)
    x, state = input_for(module), {name: tensor.clone() for name, tensor in layer.file_state().items()}
    args = WholeArgs() if name == "norm" else CASES[name][1]
    again = type(layer).rebuild([module], state, args)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.file_state().items())
    expected = adapted(layer, module, x)
    torch.testing.assert_close(adapted(again, module, x), expected, rtol=1e-5, atol=1e-5)
    models = Models(nn.ModuleDict({"x": copy.deepcopy(module)}), {}, {}, None)
    assert merge([LoraTarget("k", "denoiser", ("x",))], models, NetworkFile("f", {"k": state}), 1.0) == (1, 0)
    torch.testing.assert_close(models.denoiser.x(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_new_layer_changes_nothing_and_neither_does_a_multiplier_of_0(name):
    module = module_of("linear")
    kind, args, rank, *_ = CASES[name]
    new = kind.build([module], rank, 2.0, args)
    new.init_weights(torch.Generator().manual_seed(1))
    assert new.rank == rank
    x = input_for(module)
    torch.testing.assert_close(adapted(new, module, x), module(x), rtol=1e-5, atol=1e-5)
    layer, _ = made(name, module)
    if not name.startswith("boft"):
        full = adapted(layer, module, x) - module(x)
        layer.multiplier = 0.5
        torch.testing.assert_close(adapted(layer, module, x) - module(x), full / 2, rtol=1e-4, atol=1e-4)
    layer.multiplier = 0.0
    assert torch.equal(adapted(layer, module, x), module(x))


@pytest.mark.parametrize("multiplier", [0.5, 1.5])
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("name", ["full", "ia3", "glora", "diag-oft", "diag-oft limited", "boft"])
def test_a_multiplier_is_that_of_lycoris(name, kind, multiplier):
    """Outputs, gradients, and weights that are merged; BOFT's acts in every stage. docs/networks.md has the others."""
    module = module_of(kind)
    layer, theirs = made(name, module)
    layer.multiplier = theirs.multiplier = multiplier
    xs = [input_for(module).requires_grad_(), input_for(module).requires_grad_()]
    outputs = adapted(layer, module, xs[0]), theirs(xs[1])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.square().mean().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-3, atol=1e-5)
    models = Models(nn.ModuleDict({"x": copy.deepcopy(module)}), {}, {}, None)
    file = NetworkFile("f", {"k": {own: tensor.detach() for own, tensor in layer.file_state().items()}})
    merge([LoraTarget("k", "denoiser", ("x",))], models, file, multiplier)
    torch.testing.assert_close(models.denoiser.x(xs[0]), outputs[1], rtol=1e-3, atol=1e-4)


def test_the_factors_of_rows_of_boft_have_the_multiplier_too():
    """Unlike LyCORIS', where they are whole at any multiplier, so that 0 would not be the bare model."""
    module = module_of("linear")
    layer, _ = made("boft rescaled", module)
    state = {name: tensor.detach().clone() for name, tensor in layer.file_state().items()}
    half = {**state, "rescale": 1 + 0.5 * (state["rescale"] - 1)}
    plain = {name: tensor for name, tensor in state.items() if name != "rescale"}
    found = BoftLayer.merged_change(state, module.weight.shape, lambda: module.weight, 0.5) + module.weight
    without = BoftLayer.merged_change(plain, module.weight.shape, lambda: module.weight, 0.5) + module.weight
    torch.testing.assert_close(found, without * half["rescale"], rtol=1e-5, atol=1e-5)
    layer.multiplier = 0.5
    x = input_for(module)
    torch.testing.assert_close(adapted(layer, module, x), x @ found.T + module.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("biased", [True, False])
def test_a_full_difference_needs_no_live_output_in_training(biased):
    """One product with both weights: outputs and gradients of the formula, and no row for the live module."""
    module = module_of("linear" if biased else "linear without bias")
    layer, _ = made("full", module)
    layer.multiplier, rows = 0.7, []
    models, target = Models(nn.ModuleDict({"x": module}), {}, {}, None), LoraTarget("k", "denoiser", ("x",))
    module.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    handles = hook(models, target, layer)
    module.register_forward_hook(lambda _module, args, output: rows.append(len(args[0])))
    x, wanted = (
        input_for(module).requires_grad_(),
        {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()},
    )
    diff, bias = wanted["diffs.0"], module.bias + 0.7 * wanted["diff_b"] if biased else None
    expected = nn.functional.linear(x, module.weight + 0.7 * diff, bias)
    gradients = torch.autograd.grad(expected.square().mean(), [x, *wanted.values()])
    found = module(x)
    assert rows == [4, 0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    own = torch.autograd.grad(found.square().mean(), [x, *layer.parameters()])
    torch.testing.assert_close(own, gradients, rtol=1e-5, atol=1e-6)
    layer.eval()
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    assert rows == [4, 0, 4, 4]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", CASES)
def test_fused_layers_have_their_rows_of_one_change(name):
    """Three linear layers as one, of other widths than the blocks of a rotation."""
    parts = [nn.Linear(12, width) for width in (7, 10, 7)]
    whole = module_of("linear")
    whole.weight.data = torch.cat([part.weight.data for part in parts])
    whole.bias.data = torch.cat([part.bias.data for part in parts])
    layer, _ = made(name, whole)
    state = {name: tensor.clone() for name, tensor in layer.file_state().items()}
    fused = type(layer).rebuild(parts, state, CASES[name][1])
    x = input_for(whole)
    outputs = [fused.adapt(index, x, part(x)) for index, part in enumerate(parts)]
    torch.testing.assert_close(torch.cat(outputs, -1), adapted(layer, whole, x), rtol=1e-4, atol=1e-4)


def test_merging_has_a_strength_and_may_be_undone():
    """Weights and biases."""
    module = module_of("linear")
    layer, _ = made("full", module)
    x, file = input_for(module), NetworkFile("f", {"k": dict(layer.file_state())})
    layer.multiplier = 0.5
    expected, models = adapted(layer, module, x), Models(nn.ModuleDict({"x": copy.deepcopy(module)}), {}, {}, None)
    target = LoraTarget("k", "denoiser", ("x",))
    merge([target], models, file, 0.5)
    torch.testing.assert_close(models.denoiser.x(x), expected, rtol=1e-4, atol=1e-5)
    merge([target], models, file, -0.5)
    torch.testing.assert_close(models.denoiser.x(x), module(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="f: k: x are of no type that is known here"):
        merge([target], models, NetworkFile("f", {"k": {"x": torch.ones(1)}}), 1.0)
    wide = Models(nn.ModuleDict({"x": nn.Linear(18, 48)}), {}, {}, None)
    with pytest.raises(UserError, match=r"f: k: shape .* does not fit") as caught:
        merge([target], wide, file, 1.0)
    assert caught.value.hint == "was it made for another model?"


def test_fused_layers_are_merged_with_the_weights_of_all_their_modules():
    """A change that depends on the weight."""
    parts = nn.ModuleDict({name: nn.Linear(12, width) for name, width in (("q", 7), ("k", 10), ("v", 7))})
    models, target = Models(parts, {}, {}, None), LoraTarget("k", "denoiser", ("q", "k", "v"))
    whole = module_of("linear")
    whole.weight.data = torch.cat([part.weight.data for part in parts.values()])
    whole.bias.data = torch.cat([part.bias.data for part in parts.values()])
    layer, _ = made("glora", whole)
    x = input_for(whole)
    merge([target], models, NetworkFile("f", {"k": dict(layer.file_state())}), 1.0)
    found = torch.cat([part(x) for part in parts.values()], dim=-1)
    torch.testing.assert_close(found, adapted(layer, whole, x), rtol=1e-4, atol=1e-4)


LOW_PRECISION = [(name, "linear") for name in CASES] + [("norm", kind) for kind in NORMS]


@pytest.mark.parametrize(("name", "kind"), LOW_PRECISION)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_base_in_fewer_bits(name, kind, autocast):
    """The base is in bfloat16, whose 8 bits are the tolerance, and what is trained in float32."""
    module = module_of(kind).bfloat16()
    layer, _ = made(name, module)
    x = input_for(module).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        bare = module(x)
        output = layer.adapt(0, x, bare)
    assert output.dtype == bare.dtype
    output.float().square().mean().backward()
    assert all(parameter.grad.any() and parameter.dtype == torch.float32 for parameter in layer.parameters())
    exact = copy.deepcopy(module).float()
    layer._live = [exact]
    expected = adapted(layer, exact, x.float())
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


DROPPED = {
    "full": (FullLayer, WholeArgs(module_dropout=0.5)),
    "ia3": (Ia3Layer, WholeArgs(module_dropout=0.5)),
    "diag-oft": (OftLayer, OftArgs(module_dropout=0.5)),
    "boft": (BoftLayer, OftArgs(module_dropout=0.5)),
    "norm": (NormLayer, WholeArgs(module_dropout=0.5)),
}


@pytest.mark.parametrize("name", DROPPED)
def test_a_dropped_layer_is_the_bare_module(name):
    kind, args = DROPPED[name]
    module = module_of("layer norm" if name == "norm" else "linear")
    layer = kind.build([module], 6 if name == "boft" else 4, 1.0, args)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = input_for(module)
    bare, full = module(x), adapted(layer.eval(), module, x)
    for trained in (layer, kind.rebuild([module], dict(layer.file_state()), args)):
        trained.train()
        whole = []
        for seed in range(30):
            torch.manual_seed(seed)
            output = adapted(trained, module, x)
            whole.append(torch.allclose(output, full, rtol=1e-4, atol=1e-5))
            assert whole[-1] or torch.equal(output, bare)
        assert 5 < sum(whole) < 25


@pytest.mark.parametrize("name", ["full", "ia3", "diag-oft", "boft", "glora", "norm"])
def test_norms_are_limited(name):
    module = module_of("layer norm" if name == "norm" else "linear")
    layer, _ = made(name, module)

    def norms():
        if name in ("full", "glora"):  # of what is added to the weight; else of what is trained
            change = type(layer).weight_change(dict(layer.file_state()), module.weight.shape, lambda: module.weight)
            return [change.norm()]
        return [tensor.norm() for own, tensor in layer.named_parameters() if own != "b_norm"]

    limit = float(max(norms())) / 1.5
    layer.limit_norm(limit)
    assert float(max(norms())) == pytest.approx(limit, rel=1e-4)
    before = {own: tensor.clone() for own, tensor in layer.state_dict().items()}
    layer.limit_norm(limit * 1.01)
    assert all(torch.equal(tensor, before[own]) for own, tensor in layer.state_dict().items())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    layer.limit_norm(1e-3)  # a change of 0 has no direction
    assert not any(parameter.any() for parameter in layer.parameters())


def test_a_limited_rotation_is_that_of_its_blocks():
    """What is solved is solved again."""
    module, x = module_of("linear"), torch.randn(3, 12)
    layer, _ = made("diag-oft", module)
    adapted(layer, module, x)
    layer.limit_norm(0.1)
    again = OftLayer.rebuild([module], dict(layer.file_state()), OftArgs())
    assert torch.equal(adapted(layer, module, x), adapted(again, module, x))


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_layer_acts_as_it_did(name):
    """Also where it has computed something from its first values."""
    module = module_of("linear")
    layer, _ = made(name, module)
    kind, args, rank, *_ = CASES[name]
    x, other = input_for(module), kind.build([module], rank, 2.0, args)
    other.init_weights(torch.Generator().manual_seed(2))
    adapted(other, module, x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(adapted(other, module, x), adapted(layer, module, x))


@pytest.mark.parametrize("name", [name for name in CASES if "rescaled" not in name])
def test_what_does_not_fit_is_refused(name):
    layer, _ = made(name, module_of("linear"))
    state, wide = dict(layer.file_state()), nn.Linear(18, 48)
    with pytest.raises(UserError, match="does not fit"):
        type(layer).rebuild([wide], state, CASES[name][1])
    with pytest.raises(UserError, match="does not fit"):
        type(layer).weight_change(state, wide.weight.shape, lambda: wide.weight)


@pytest.mark.parametrize("given", [OftArgs(), OftArgs(rescaled=True)])
def test_rotations_of_other_blocks_or_without_factors_are_refused(given):
    module = module_of("linear")
    state = OftLayer.build([module], 4, 1.0, OftArgs(rescaled=not given.rescaled)).file_state()
    for other in (state, OftLayer.build([module], 3, 1.0, given).file_state()):
        with pytest.raises(UserError, match="does not fit") as caught:
            OftLayer.build([module], 4, 1.0, given).load(other)
        assert "--network_args" in caught.value.hint


def test_a_norm_that_does_not_fit_is_refused():
    layer = NormLayer.build([nn.LayerNorm(12)], 1, None, WholeArgs())
    for state in ({"w_norm": torch.ones(8), "b_norm": torch.ones(12)}, {"w_norm": torch.ones(12), "x": torch.ones(12)}):
        with pytest.raises(UserError, match="does not fit"):
            layer.load(state)
    with pytest.raises(UserError, match="does not fit"):
        NormLayer.weight_change({"w_norm": torch.ones(8)}, torch.Size((12,)), None)


def test_a_norm_without_bias():
    module = nn.LayerNorm(12, bias=False)
    layer = NormLayer.build([module], 1, None, WholeArgs())
    nn.init.normal_(layer.w_norm)
    x, changed = input_for(nn.Linear(12, 1)), copy.deepcopy(module)
    changed.weight.data = module.weight.data + layer.w_norm.data
    torch.testing.assert_close(adapted(layer, module, x), changed(x), rtol=1e-5, atol=1e-5)
    assert list(layer.file_state()) == ["w_norm"]
    assert NormLayer.bias_change(layer.file_state()) is None


@pytest.mark.parametrize("kind", NORMS)
def test_the_strength_of_a_norm_and_its_merging_in_float32(kind):
    module = module_of(kind)
    layer, _ = made("norm", module)
    x = input_for(module)
    full = adapted(layer, module, x) - module(x)
    layer.multiplier = 0.5
    torch.testing.assert_close(adapted(layer, module, x) - module(x), full / 2, rtol=1e-4, atol=1e-5)
    half = {name: tensor.bfloat16() for name, tensor in layer.file_state().items()}
    found = (NormLayer.weight_change(half, module.weight.shape, None), NormLayer.bias_change(half))
    assert [tensor.dtype for tensor in found] == [torch.float32] * 2
    assert [torch.equal(a, b.float()) for a, b in zip(found, half.values(), strict=True)] == [True] * 2
    assert layer.rank == 1


@pytest.mark.parametrize("name", ["full", "ia3", "ia3 on inputs", "glora", "diag-oft", "boft rescaled"])
def test_1x1_convolutions_and_linear_layers_read_each_other(name):
    convolution, linear = nn.Conv2d(8, 24, 1), nn.Linear(8, 24)
    linear.weight.data, linear.bias.data = convolution.weight.data[:, :, 0, 0], convolution.bias.data
    layer, _ = made(name, convolution)
    kind, args, rank, *_ = CASES[name]
    loaded = kind.build([linear], rank, 2.0, args)
    loaded.load(dict(layer.file_state()))
    x = torch.randn(2, 8, 3, 4)
    expected = adapted(layer, convolution, x)
    for other in (loaded, kind.rebuild([linear], dict(layer.file_state()), args)):
        found = adapted(other, linear, x.movedim(1, -1)).movedim(-1, 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    again = kind.rebuild([convolution], dict(loaded.file_state()), args)
    torch.testing.assert_close(adapted(again, convolution, x), expected, rtol=1e-4, atol=1e-4)


def test_inputs_and_outputs_of_ia3_are_told_apart():
    """A square layer, where the shapes are the same."""
    module = nn.Linear(12, 12)
    rows, columns = (Ia3Layer.build([module], 1, 1.0, WholeArgs(train_on_input=given)) for given in (False, True))
    with pytest.raises(UserError, match="on inputs does not fit"):
        rows.load(columns.file_state())
    with pytest.raises(UserError, match="on outputs does not fit"):
        columns.load(rows.file_state())


def test_glora_begins_with_values_of_its_generator():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(states))
        layer = GloraLayer.build([nn.Linear(256, 64)], 16, 1.0, LyLoconArgs())
        layer.init_weights(torch.Generator().manual_seed(seed))
        states.append(layer.file_state())
    for name in ("a1.weight", "b1.weight"):
        assert torch.equal(states[0][name], states[1][name])
        assert not torch.equal(states[0][name], states[2][name])
        assert 0.9 / 4 < states[0][name].abs().max() <= 1 / 4  # kaiming-uniform with a = sqrt(5): 1 / sqrt(16 inputs)
    assert not states[0]["a2.weight"].any()
    assert not states[0]["b2.weight"].any()


def test_glora_with_a_trained_factor():
    module = module_of("linear")
    layer = GloraLayer.build([module], 2, 1.0, LyLoconArgs(use_scalar=True))
    layer.init_weights(torch.Generator().manual_seed(1))
    x = input_for(module)
    torch.testing.assert_close(adapted(layer, module, x), module(x))
    nn.init.constant_(layer.scalar, 0.7)
    again = GloraLayer.rebuild([module], dict(layer.file_state()), LyLoconArgs())
    assert (adapted(layer, module, x) - module(x)).abs().max() > 1e-2
    torch.testing.assert_close(adapted(again, module, x), adapted(layer, module, x))


# ---- sd-scripts' OFT


def kohya_weight(weight, blocks, alpha):
    """The published formula, written out: blocks (b, n, n), rows in blocks."""
    skew = blocks - blocks.transpose(1, 2)
    norm, limit = skew.norm(), alpha * weight.shape[0]
    skew = skew * (torch.clamp(norm, max=limit) + 1e-8) / (norm + 1e-8)
    eye = torch.eye(blocks.shape[1])
    rotation = torch.matmul(eye + skew, torch.inverse(eye - skew))
    cut = weight.reshape(len(blocks), blocks.shape[1], -1)
    return torch.einsum("knm,knp->kmp", rotation, cut).reshape(weight.shape)


@pytest.mark.rows("R307", "R308", "R309", "R311", "R312")
@pytest.mark.parametrize("alpha", [1e-3, 0.01, 1])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_rotation_of_sd_scripts(kind, alpha):
    module = module_of(kind)
    layer = OftLayer.build([module], 4, alpha, KohyaOftArgs())
    assert layer.rank == 4
    nn.init.normal_(layer.blocks[0], std=0.2, generator=torch.Generator().manual_seed(1))
    state = layer.file_state()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "oft_blocks": (4, module.weight.shape[0] // 4, module.weight.shape[0] // 4),
        "alpha": (),
    }
    x, merged = input_for(module), copy.deepcopy(module)
    merged.weight.data = kohya_weight(module.weight, layer.blocks[0].detach(), alpha)
    torch.testing.assert_close(adapted(layer, module, x), merged(x), rtol=1e-4, atol=1e-4)


@pytest.mark.rows("R310")
def test_rotations_are_solved_in_float32():
    """A layer in bfloat16 turns by what float32 gives for its numbers, which are rounded once afterwards."""
    module = module_of("linear")
    layer = OftLayer.build([module], 2, 1.0, KohyaOftArgs())
    nn.init.normal_(layer.blocks[0], std=0.3, generator=torch.Generator().manual_seed(1))
    layer.to(torch.bfloat16)
    skew = (layer.blocks[0] - layer.blocks[0].transpose(1, 2)).detach()
    eye = torch.eye(12, dtype=torch.float64)
    exact = (eye + skew.double()) @ torch.inverse(eye - skew.double())
    torch.testing.assert_close(layer._rotation(0).double(), exact, rtol=2**-8, atol=1e-6)
    x = torch.randn(5, 12).to(torch.bfloat16)
    assert layer.adapt(0, x, module.to(torch.bfloat16)(x)).dtype == torch.bfloat16


@pytest.mark.rows("C59", "R316", "R317", "R318")
@pytest.mark.parametrize("blocks", [64, 128, 256, 512, 1024])
def test_the_layers_of_flux_can_be_cut_into_these_numbers_of_blocks(blocks):
    """More blocks are smaller ones. 3,072 are the rows of the stream's layers, 12,288 those of the widest in an MLP."""
    for rows in (3072, 12288):
        assert NumberedOftArgs().cut(rows, blocks) == (blocks, rows // blocks)


def test_blocks_of_fused_layers_have_numbers_and_constraints_of_their_own():
    parts = [nn.Linear(12, width) for width in (8, 8, 16)]
    layer = OftLayer.build(parts, 4, 0.01, NumberedOftArgs())
    for blocks in layer.blocks:
        nn.init.normal_(blocks, std=0.2)
    assert {name: tuple(tensor.shape) for name, tensor in layer.file_state().items()} == {
        "oft_blocks.0": (4, 2, 2),
        "oft_blocks.1": (4, 2, 2),
        "oft_blocks.2": (4, 4, 4),
        "alpha": (),
    }
    x = torch.randn(3, 12)
    for index, part in enumerate(parts):
        merged = copy.deepcopy(part)
        merged.weight.data = kohya_weight(part.weight.data, layer.blocks[index].detach(), 0.01)
        torch.testing.assert_close(layer.adapt(index, x, part(x)), merged(x), rtol=1e-4, atol=1e-5)
    again = OftLayer.rebuild(parts, {n: t.clone() for n, t in layer.file_state().items()}, NumberedOftArgs())
    torch.testing.assert_close(again.adapt(2, x, parts[2](x)), layer.adapt(2, x, parts[2](x)))
    assert list(OftLayer.build([parts[0]], 4, 0.01, NumberedOftArgs()).file_state()) == ["alpha", "oft_blocks.0"]


def test_a_rotation_is_solved_once_between_steps(monkeypatch):
    from networks.layers import oft

    solved = []
    monkeypatch.setattr(oft, "cayley", lambda skew, of=oft.cayley: solved.append(1) or of(skew))
    module, x = module_of("linear"), torch.randn(3, 12)
    layer = OftLayer.build([module], 4, 1.0, KohyaOftArgs()).train()
    for step in range(2):
        for _ in range(3):
            adapted(layer, module, x).square().sum().backward()
        assert len(solved) == step + 1
        layer.before_step()
    first = adapted(layer, module, x)
    with torch.no_grad():
        layer.blocks[0].add_(torch.randn_like(layer.blocks[0]))
    layer.eval()  # what is exchanged around an evaluation is seen
    assert not torch.allclose(adapted(layer, module, x), first)


@pytest.mark.rows("R318")
def test_rows_that_cannot_be_cut():
    with pytest.raises(UserError, match="its 24 output rows cannot be cut into 5 blocks"):
        OftLayer.build([nn.Linear(12, 24)], 5, 1.0, KohyaOftArgs())
    with pytest.raises(UserError, match="7 rows cannot be cut"):
        BoftLayer.build([nn.Linear(12, 7)], 4, 1.0, OftArgs())


def test_a_chain_over_fused_layers_is_turned_once_for_each_input(monkeypatch):
    from networks.layers import oft

    turned, turn = [], oft.turn_in_stages
    monkeypatch.setattr(oft, "turn_in_stages", lambda *given, **more: turned.append(1) or turn(*given, **more))
    parts = [nn.Linear(12, width, bias=False) for width in (7, 10, 7)]
    layer = BoftLayer.build(parts, 6, 1.0, OftArgs())
    for step in range(1, 3):
        x = torch.randn(3, 12)
        sum(layer.adapt(index, x, part(x)).square().sum() for index, part in enumerate(parts)).backward()
        assert len(turned) == step


@pytest.mark.parametrize(
    "shape", [(4, 4, 6, 6), (2, 3, 8, 8), (2, 2, 12, 13), (2, 12, 13), (4, 5, 5), (24, 24)], ids=str
)
def test_blocks_that_no_layer_has_are_refused(shape):
    with pytest.raises(UserError, match="does not fit"):
        OftLayer.weight_change({"oft_blocks": torch.zeros(shape)}, torch.Size((24, 12)), lambda: torch.ones(24, 12))
