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
from networks.types.full import FullLayer, NormLayer
from networks.types.oft import BoftLayer, OftLayer
from networks.types.scaled import GloraLayer, Ia3Layer

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
def test_a_new_layer_changes_nothing_and_a_multiplier_is_linear(name):
    module = module_of("linear")
    kind, args, rank, *_ = CASES[name]
    new = kind.build([module], rank, 2.0, args)
    new.init_weights(torch.Generator().manual_seed(1))
    x = input_for(module)
    torch.testing.assert_close(adapted(new, module, x), module(x), rtol=1e-5, atol=1e-5)
    layer, _ = made(name, module)
    full = adapted(layer, module, x) - module(x)
    layer.multiplier = 0.5
    torch.testing.assert_close(adapted(layer, module, x) - module(x), full / 2, rtol=1e-4, atol=1e-4)
    layer.multiplier = 0.0
    assert torch.equal(adapted(layer, module, x), module(x))


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


@pytest.mark.parametrize("alpha", [1e-3, 0.01, 1])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_rotation_of_sd_scripts(kind, alpha):
    module = module_of(kind)
    layer = OftLayer.build([module], 4, alpha, KohyaOftArgs())
    nn.init.normal_(layer.blocks[0], std=0.2, generator=torch.Generator().manual_seed(1))
    state = layer.file_state()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "oft_blocks": (4, module.weight.shape[0] // 4, module.weight.shape[0] // 4),
        "alpha": (),
    }
    x, merged = input_for(module), copy.deepcopy(module)
    merged.weight.data = kohya_weight(module.weight, layer.blocks[0].detach(), alpha)
    torch.testing.assert_close(adapted(layer, module, x), merged(x), rtol=1e-4, atol=1e-4)


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
    from networks.types import oft

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


def test_rows_that_cannot_be_cut():
    with pytest.raises(UserError, match="its 24 output rows cannot be cut into 5 blocks"):
        OftLayer.build([nn.Linear(12, 24)], 5, 1.0, KohyaOftArgs())
    with pytest.raises(UserError, match="7 rows cannot be cut"):
        BoftLayer.build([nn.Linear(12, 7)], 4, 1.0, OftArgs())


def test_a_chain_over_fused_layers_is_turned_once_for_each_input(monkeypatch):
    from networks.types import oft

    turned = []
    monkeypatch.setattr(oft, "turn_in_stages", lambda *given, of=oft.turn_in_stages: turned.append(1) or of(*given))
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
