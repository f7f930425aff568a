"""LoCon, LoHa and LoKr, with DoRA: each layer by itself. Reference: the same layer of lycoris, float32."""

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
from networks.layer_args import ChangeArgs
from networks.layers.locon import LoconLayer
from networks.layers.loha import LohaLayer
from networks.layers.lokr import LokrLayer

MODULES = {
    "linear": lambda: nn.Linear(12, 20),
    "linear without bias": lambda: nn.Linear(12, 20, bias=False),
    "convolution": lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1),
    "1x1 convolution": lambda: nn.Conv2d(8, 12, 1),
}
TYPES = {
    "locon": (LoconLayer, "LoConModule"),
    "loha": (LohaLayer, "LohaModule"),
    "lokr": (LokrLayer, "LokrModule"),
}
GIVEN = {
    "plain": {},
    "Tucker": {"use_tucker": True},
    "scalar": {"use_scalar": True},
    "rs_lora": {"rs_lora": True},
    "DoRA": {"dora_wd": True},
    "DoRA by columns": {"dora_wd": True, "wd_on_output": False},
    "DoRA with all": {"dora_wd": True, "use_tucker": True, "use_scalar": True, "rs_lora": True},
}
KRONECKER = {
    "factor 2": {"factor": 2},
    "factor 5": {"factor": 5},
    "both decomposed": {"decompose_both": True, "factor": 4},
    "full matrix": {"full_matrix": True, "factor": 4},
    "unbalanced": {"unbalanced_factorization": True},
}
CASES = [(algo, name) for algo in TYPES for name in GIVEN] + [("lokr", name) for name in KRONECKER]


def input_for(module):
    torch.manual_seed(3)
    return torch.randn(4, 5, 12) if isinstance(module, nn.Linear) else torch.randn(2, 8, 6, 7)


def made(algo, given, module, rank=1, alpha=0.5):
    """A layer of ours with values that change the output, and lycoris' with the same."""
    ours, name = TYPES[algo]
    torch.manual_seed(7)
    layer = ours.build([module], rank, alpha, ChangeArgs(**given))
    layer.init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    theirs_given = {key: value for key, value in given.items() if key not in ("dora_wd", "wd_on_output")}
    theirs_given |= {"weight_decompose": given.get("dora_wd", False), "wd_on_out": given.get("wd_on_output", True)}
    kind = getattr(importlib.import_module(f"lycoris.modules.{algo}"), name)
    theirs = kind("x", module, 1.0, rank, alpha, **theirs_given)
    with torch.no_grad():
        for name, tensor in layer.file_state().items():
            own = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
            own[name].copy_(tensor)
        theirs.scalar.fill_(1)
    return layer, theirs


def adapted(layer, module, x):
    return layer.adapt(0, x, module(x))


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(("algo", "name"), CASES)
def test_outputs_and_gradients_are_those_of_lycoris(algo, name, kind):
    module = MODULES[kind]()
    module.requires_grad_(False)
    layer, theirs = made(algo, {**GIVEN, **KRONECKER}[name], module)
    x = input_for(module)
    xs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    ours, reference = adapted(layer, module, xs[0]), theirs(xs[1])
    assert (ours - module(x)).abs().max() > 1e-2
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    for output in (ours, reference):
        output.square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-4)
    if layer.scalar is not None:
        return  # their file's scalar is 1: the gradients of what it multiplies differ by it
    theirs_by_name = dict(theirs.named_parameters())
    for own in [*layer.names, *(["dora_scale"] if layer.args.dora_wd else [])]:
        gradient = getattr(layer, own.replace(".", "_")).grad
        torch.testing.assert_close(gradient, theirs_by_name[own].grad, rtol=1e-4, atol=1e-4)


# Which factor is applied first, and whether the change itself is formed, depends on ranks and widths.
WIDE, TALL, IMAGE = lambda: nn.Linear(36, 16), lambda: nn.Linear(16, 36), lambda: nn.Conv2d(16, 24, 3, padding=1)
ORDERS = {
    "locon": [(WIDE, 3, {}), (IMAGE, 3, {}), (IMAGE, 3, {"use_tucker": True})],
    "loha": [(WIDE, 2, {}), (WIDE, 6, {}), (IMAGE, 3, {}), (IMAGE, 9, {}), (IMAGE, 3, {"use_tucker": True})],
    "lokr": [
        *((module, 2, {}) for module in (WIDE, TALL, IMAGE)),
        *((module, 2, {"full_matrix": True, "factor": 2}) for module in (WIDE, TALL, IMAGE)),
        (lambda: nn.Linear(3, 36), 5, {"factor": 3}),  # its second matrix is smaller than that matrix's factors
        (IMAGE, 2, {"use_tucker": True}),
        (WIDE, 2, {"unbalanced_factorization": True}),
    ],
}


@pytest.mark.parametrize("dora", [{}, {"dora_wd": True}, {"dora_wd": True, "wd_on_output": False}], ids=str)
@pytest.mark.parametrize(
    ("algo", "make", "rank", "given"),
    [(algo, *order) for algo, orders in ORDERS.items() for order in orders],
)
def test_every_order_of_the_factors_gives_the_same(algo, make, rank, given, dora):
    module = make().requires_grad_(False)
    layer, theirs = made(algo, {**given, **dora}, module, rank)
    torch.manual_seed(3)
    x = torch.randn(2, 16, 5, 5) if isinstance(module, nn.Conv2d) else torch.randn(4, 5, module.in_features)
    xs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    results = adapted(layer, module, xs[0]), theirs(xs[1])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    for result in results:
        result.square().mean().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-5)
    theirs_by_name = dict(theirs.named_parameters())
    for own in [*layer.names, *(["dora_scale"] if dora else [])]:
        gradient = getattr(layer, own.replace(".", "_")).grad
        torch.testing.assert_close(gradient, theirs_by_name[own].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("algo", TYPES)
def test_a_row_or_column_of_zeros_has_gradients(algo, by_row):
    """As the last layers of some models have them: the norm of zeros has no slope."""
    module = nn.Linear(12, 20, bias=False).requires_grad_(False)
    module.weight[3], module.weight[:, 4] = 0, 0
    layer = TYPES[algo][0].build([module], 2, 1.0, ChangeArgs(dora_wd=True, wd_on_output=by_row))
    layer.init_weights(torch.Generator().manual_seed(1))
    adapted(layer, module, input_for(module)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_the_norms_of_a_fused_layer_are_computed_once_for_each_input(monkeypatch):
    from networks.layers import change

    counted = []
    squares = change.LowRankSquares.apply
    monkeypatch.setattr(change.LowRankSquares, "apply", lambda *args: counted.append(1) or squares(*args))
    parts = [nn.Linear(12, width) for width in (7, 10, 3)]
    layer = LoconLayer.build(parts, 2, 1.0, ChangeArgs(dora_wd=True, wd_on_output=False))
    layer.init_weights(torch.Generator().manual_seed(1))
    for step in range(1, 3):
        x = torch.randn(4, 12)
        sum(layer.adapt(index, x, part(x)).sum() for index, part in enumerate(parts)).backward()
        assert len(counted) == step * len(parts)
    with torch.no_grad():
        layer.adapt(1, x, parts[1](x))
    layer.adapt(0, x, parts[0](x)).sum().backward()  # what was made without gradients is not used for this one
    assert len(counted) == 4 * len(parts)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(("algo", "name"), CASES)
def test_a_file_gives_the_same_layer_and_the_same_weights(algo, name, kind):
    module = MODULES[kind]()
    module.requires_grad_(False)
    layer, _ = made(algo, {**GIVEN, **KRONECKER}[name], module)
    x, state = input_for(module), {name: tensor.clone() for name, tensor in layer.file_state().items()}
    again = type(layer).rebuild([module], state, ChangeArgs())
    without_rank = {"lokr_w1", "lokr_w2"} <= state.keys()  # then no alpha counts
    assert all(torch.equal(t, state[n]) for n, t in again.file_state().items() if n != "alpha" or not without_rank)
    expected = adapted(layer, module, x)
    torch.testing.assert_close(adapted(again, module, x), expected, rtol=1e-5, atol=1e-5)
    models = Models(nn.ModuleDict({"x": copy.deepcopy(module)}), {}, {}, None)
    target = LoraTarget("k", "denoiser", ("x",))
    assert merge([target], models, NetworkFile("f", {"k": state}), 1.0) == (1, 0)
    torch.testing.assert_close(models.denoiser.x(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algo", TYPES)
@pytest.mark.parametrize("given", [{}, {"use_scalar": True}, {"dora_wd": True}], ids=["plain", "scalar", "DoRA"])
def test_a_new_layer_changes_nothing(algo, given):
    module = nn.Linear(12, 20)
    layer = TYPES[algo][0].build([module], 2, 1.0, ChangeArgs(**given))
    layer.init_weights(torch.Generator().manual_seed(1))
    x = input_for(module)
    torch.testing.assert_close(adapted(layer, module, x), module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algo", TYPES)
@pytest.mark.parametrize("name", ["plain", "DoRA", "DoRA by columns", "factor 5", "both decomposed"])
def test_fused_layers_have_their_rows_of_one_change(algo, name):
    """Three linear layers as one: of other widths than the blocks of a Kronecker product."""
    if name in KRONECKER and algo != "lokr":
        pytest.skip("of LoKr alone")
    parts = [nn.Linear(12, width) for width in (7, 10, 3)]
    whole = nn.Linear(12, 20)
    whole.weight.data = torch.cat([part.weight.data for part in parts])
    whole.bias.data = torch.cat([part.bias.data for part in parts])
    layer, _ = made(algo, {**GIVEN, **KRONECKER}[name], whole)
    state = {name: tensor.clone() for name, tensor in layer.file_state().items()}
    fused = type(layer).rebuild(parts, state, ChangeArgs())
    x = input_for(whole)
    outputs = [fused.adapt(index, x, part(x)) for index, part in enumerate(parts)]
    torch.testing.assert_close(torch.cat(outputs, -1), adapted(layer, whole, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algo", TYPES)
@pytest.mark.parametrize("dora", [False, True])
def test_a_multiplier_of_0_is_the_bare_module_and_half_is_half(algo, dora):
    module = nn.Linear(12, 20)
    layer, _ = made(algo, {"dora_wd": dora}, module)
    x = input_for(module)
    full = adapted(layer, module, x) - module(x)
    layer.multiplier = 0.5
    torch.testing.assert_close(adapted(layer, module, x) - module(x), full / 2, rtol=1e-4, atol=1e-5)
    layer.multiplier = 0.0
    assert torch.equal(adapted(layer, module, x), module(x))


@pytest.mark.parametrize("algo", TYPES)
@pytest.mark.parametrize("name", ["plain", "Tucker", "scalar"])
def test_norms_are_limited(algo, name):
    module = MODULES["convolution"]()
    layer, _ = made(algo, GIVEN[name], module)
    limit = float((layer.product(layer.tensors()) * layer.scale).norm()) / 1.7
    layer.limit_norm(limit)
    norm = (layer.product(layer.tensors()) * layer.scale).norm()
    torch.testing.assert_close(norm, torch.tensor(limit), rtol=1e-5, atol=0)
    before = {name: tensor.clone() for name, tensor in layer.file_state().items()}
    layer.limit_norm(limit * 1.01)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.file_state().items())
    layer.init_weights(torch.Generator().manual_seed(1))  # a change of 0 has no direction
    layer.limit_norm(1e-3)
    assert all(tensor.isfinite().all() for tensor in layer.file_state().values())


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("name", ["plain", "Tucker", "DoRA", "DoRA by columns", "DoRA with all"])
def test_a_bias_beside_the_change_is_added_and_trained(name, kind):
    """As files of other programs have it. The norm that is limited is that of the weight's change alone."""
    module = MODULES[kind]().requires_grad_(False)
    plain, _ = made("locon", GIVEN[name], module)
    bias = torch.randn(len(module.bias), generator=torch.Generator().manual_seed(2))
    state = {own: tensor.clone() for own, tensor in plain.file_state().items()} | {"diff_b": bias}
    layer = LoconLayer.rebuild([module], state, ChangeArgs())
    layer.multiplier = plain.multiplier = 0.5
    x = input_for(module)
    axis = [-1] if kind == "linear" else [-1, 1, 1]
    outputs = [adapted(layer, module, x), adapted(plain, module, x)]
    torch.testing.assert_close(outputs[0], outputs[1] + bias.reshape(axis) / 2, rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.sum().backward()
    torch.testing.assert_close(layer.diff_b.grad, torch.full_like(bias, outputs[0].numel() / len(bias) / 2))
    torch.testing.assert_close(layer.lora_down_weight.grad, plain.lora_down_weight.grad, rtol=1e-4, atol=1e-4)
    limit = float(layer.whole_change().detach().norm()) / 1.7
    layer.limit_norm(limit)
    assert float(layer.whole_change().detach().norm()) == pytest.approx(limit, rel=1e-5)
    assert torch.equal(layer.file_state()["diff_b"], bias)


@pytest.mark.parametrize("algo", TYPES)
def test_dropouts_act_on_rows_in_training_only(algo):
    module = nn.Linear(12, 20)
    layer, _ = made(algo, {"rank_dropout": 0.5, "rank_dropout_scale": True}, module)
    x = input_for(module)
    full = adapted(layer.eval(), module, x) - module(x)
    torch.manual_seed(0)
    dropped = adapted(layer.train(), module, x) - module(x)
    kept = dropped.abs().amax((0, 1)) > 0
    assert 3 < kept.sum() < 17
    torch.testing.assert_close(dropped[..., kept], full[..., kept] * 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_other_dropouts(kind):
    """Each output by itself, with the mean kept; and the whole change of a layer."""
    module = MODULES[kind]()
    layer, _ = made("locon", {"dropout": 0.5}, module)
    x = input_for(module)
    full = adapted(layer.eval(), module, x) - module(x)
    torch.manual_seed(0)
    dropped = adapted(layer.train(), module, x) - module(x)
    kept = dropped != 0
    assert 0.3 < kept.float().mean() < 0.7  # of some hundred
    torch.testing.assert_close(dropped[kept], full[kept] * 2, rtol=1e-4, atol=1e-5)
    layer, _ = made("locon", {"module_dropout": 0.5}, module)
    whole = []
    for _ in range(40):
        dropped = adapted(layer.train(), module, x) - module(x)
        whole.append(torch.allclose(dropped, full, rtol=1e-4, atol=1e-5))
        assert whole[-1] or not dropped.any()
    assert 8 < sum(whole) < 32


@pytest.mark.parametrize("name", ["plain", "DoRA", "DoRA by columns"])
@pytest.mark.parametrize("algo", TYPES)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_base_in_fewer_bits(algo, name, autocast):
    """Outputs have the base's dtype, or autocast's, and those of the same weights in float32 to bfloat16's 8 bits."""
    module = nn.Linear(12, 20).bfloat16().requires_grad_(False)
    layer, _ = made(algo, GIVEN[name], module)
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(5)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = adapted(layer, module, x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(parameter.grad.any() and parameter.dtype == torch.float32 for parameter in layer.parameters())
    exact = copy.deepcopy(module).float()
    again = type(layer).rebuild([exact], dict(layer.file_state()), ChangeArgs())
    expected = adapted(again, exact, x.float())
    torch.testing.assert_close(output.float(), expected, rtol=0.03, atol=0.03 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "modules",
    [[nn.Conv2d(8, 12, 3, groups=2)], [nn.Conv2d(8, 12, 3, padding_mode="reflect")], [nn.Conv2d(8, 12, 1)] * 2],
    ids=["groups", "padding", "several"],
)
def test_convolutions_that_have_no_such_change(modules):
    with pytest.raises(TypeError, match="cannot adapt"):
        LoconLayer.build(modules, 2, 1.0, ChangeArgs())


@pytest.mark.parametrize("algo", TYPES)
def test_rs_lora_divides_by_the_root_of_the_rank(algo):
    """arXiv:2312.03732; files have the alpha by which readers who divide by the rank get the same scale."""
    layer = TYPES[algo][0].build([nn.Linear(12, 20)], 4, 3.0, ChangeArgs(rs_lora=True, factor=2))
    assert (layer.scale, float(layer.file_state()["alpha"])) == (3 / 4**0.5, 3 * 4**0.5)


@pytest.mark.parametrize("decompose_both", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_matrices_of_lokr_are_products_below_half_of_their_sides(rank, decompose_both):
    """16 x 16 is 4 x 4 times 4 x 4. Without a product there is no rank, and readers who divide by it get 1."""
    module, given = nn.Linear(16, 16), {"decompose_both": decompose_both}
    layer, theirs = made("lokr", given, module, rank=rank)
    assert sorted(layer.names) == sorted(name for name, _ in theirs.named_parameters())
    assert ("lokr_w2" in layer.names) == (rank >= 2)
    assert float(layer.file_state()["alpha"]) == (0.5 if rank == 1 else layer.rank)


# ---- files


@pytest.mark.parametrize("algo", TYPES)
def test_what_does_not_fit_is_refused(algo):
    module = nn.Linear(12, 20)
    kind = TYPES[algo][0]
    layer = kind.build([module], 2, 1.0, ChangeArgs(factor=2))
    state = {name: tensor.clone() for name, tensor in layer.file_state().items()}
    other = kind.build([module], 3, 1.0, ChangeArgs(factor=2))
    with pytest.raises(UserError, match=r"does not fit .*; the file's rank is 2") as caught:
        other.load(state)
    assert "--dim_from_weights" in caught.value.hint
    with pytest.raises(UserError, match=r"the file has .*dora_scale.*, the network ") as caught:
        layer.load({**state, "dora_scale": torch.ones(20, 1)})
    assert "--network_args" in caught.value.hint
    for width, height in ((20, 12), (12, 24)):
        with pytest.raises(UserError, match="does not fit"):
            kind.rebuild([nn.Linear(width, height)], state, ChangeArgs())
        with pytest.raises(UserError, match="does not fit"):
            kind.weight_change(state, torch.Size((height, width)), None)


@pytest.mark.parametrize(
    ("algo", "given"), [*((algo, {"factor": 2}) for algo in TYPES), ("lokr", {"factor": 2, "full_matrix": True})]
)
def test_1x1_convolutions_and_linear_layers_read_each_other(algo, given):
    convolution, linear = nn.Conv2d(8, 12, 1), nn.Linear(8, 12)
    linear.weight.data, linear.bias.data = convolution.weight.data[:, :, 0, 0], convolution.bias.data
    kind, args = TYPES[algo][0], ChangeArgs(**given)
    layer, _ = made(algo, given, convolution)
    loaded, rebuilt = kind.build([linear], 1, 0.5, args), kind.rebuild([linear], layer.file_state(), args)
    loaded.load(layer.file_state())
    x = input_for(convolution)
    expected = adapted(layer, convolution, x)
    for other in (loaded, rebuilt):
        found = adapted(other, linear, x.movedim(1, -1)).movedim(-1, 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    again = kind.rebuild([convolution], loaded.file_state(), args)
    torch.testing.assert_close(adapted(again, convolution, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algo", TYPES)
def test_first_values_come_from_the_generator(algo):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(states))
        layer = TYPES[algo][0].build([nn.Linear(12, 20)], 2, 1.0, ChangeArgs(factor=2))
        layer.init_weights(torch.Generator().manual_seed(seed))
        states.append(layer.file_state())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        assert torch.equal(tensor, states[2][name]) == (not tensor.any() or name == "alpha")


@pytest.mark.parametrize(("algo", "names"), [("locon", ["lora_down.weight"]), ("lokr", ["lokr_w1", "lokr_w2_a"])])
def test_first_values_are_uniform_to_the_root_of_the_inputs(algo, names):
    layer = TYPES[algo][0].build([nn.Linear(1024, 1024)], 8, 1.0, ChangeArgs())
    layer.init_weights(torch.Generator().manual_seed(1))
    for name in names:
        values = layer.file_state()[name]
        bound = values.shape[1] ** -0.5
        assert 0.9 * bound < values.abs().max() <= bound
        assert values.std() == pytest.approx(bound / 3**0.5, rel=0.15)  # some hundred values


@pytest.mark.parametrize(
    ("use_tucker", "wanted"),
    [
        (False, {"w1_a": 0.1, "w1_b": 1, "w2_a": 0, "w2_b": 1}),
        (True, {"t1": 0.1, "t2": 0.1, "w1_a": 0, "w1_b": 1, "w2_a": 0.1, "w2_b": 1}),
    ],
)
def test_first_values_of_loha_are_normal(use_tucker, wanted):
    layer = LohaLayer.build([nn.Conv2d(64, 64, 3)], 16, 1.0, ChangeArgs(use_tucker=use_tucker))
    layer.init_weights(torch.Generator().manual_seed(1))
    deviations = {name: float(tensor.std()) for name, tensor in layer.file_state().items() if name != "alpha"}
    assert deviations == pytest.approx({f"hada_{name}": value for name, value in wanted.items()}, rel=0.1)


@pytest.mark.parametrize("algo", TYPES)
def test_a_file_goes_on_with_a_trained_factor(algo):
    module = nn.Linear(12, 20)
    layer, _ = made(algo, {}, module)
    other = TYPES[algo][0].build([module], 1, 0.5, ChangeArgs(use_scalar=True))
    other.load(layer.file_state())
    x = input_for(module)
    torch.testing.assert_close(adapted(other, module, x), adapted(layer, module, x))


@pytest.mark.parametrize("algo", TYPES)
def test_changes_are_merged_in_float32(algo):
    layer, _ = made(algo, {}, nn.Linear(12, 20))
    half = {name: tensor.bfloat16() for name, tensor in layer.file_state().items()}
    change = type(layer).weight_change(half, layer.shape, None)
    expected = type(layer).weight_change({name: t.float() for name, t in half.items()}, layer.shape, None)
    assert change.dtype == torch.float32
    assert torch.equal(change, expected)


@pytest.mark.parametrize(
    ("algo", "given", "scale"),
    [("locon", {}, 3.0), ("loha", {}, 3.0), ("lokr", {}, 3.0), ("lokr", {"full_matrix": True}, 1.0)],
)
def test_a_resumed_state_has_its_scale(algo, given, scale):
    module = nn.Linear(12, 20)
    layer, _ = made(algo, given, module, alpha=3.0)
    other = TYPES[algo][0].build([module], 1, 1.0, ChangeArgs(**given))
    other.load_state_dict(layer.state_dict())
    assert other.scale == layer.scale == scale


@pytest.mark.parametrize("algo", TYPES)
@pytest.mark.parametrize("rs_lora", [False, True])
def test_a_new_layer_and_a_resumed_one_have_the_same_scale_to_the_bit(algo, rs_lora):
    """Alphas are kept in float32, where 0.1 and the roots of most ranks are other numbers."""
    ours, _ = TYPES[algo]
    module = nn.Linear(12, 20)
    first, second = (ours.build([module], 3, 0.1, ChangeArgs(rs_lora=rs_lora, factor=2)) for _ in range(2))
    first.init_weights(torch.Generator().manual_seed(1))
    second.load_state_dict(first.state_dict())
    assert second.scale == first.scale


@pytest.mark.parametrize("algo", TYPES)
def test_an_entry_without_alpha_has_its_rank_as_alpha(algo):
    ours, _ = TYPES[algo]
    layer = ours.build([nn.Linear(12, 20)], 2, 0.5, ChangeArgs(factor=2))
    layer.init_weights(torch.Generator().manual_seed(1))
    layer.load({name: tensor for name, tensor in layer.file_state().items() if name != "alpha"})
    assert (float(layer.alpha), layer.scale) == (2.0, 1.0)
