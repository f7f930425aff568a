"""LoRA's own products: what they give, what they hand on to the weights, and how many operations they take."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from networks.layer_args import LoraArgs, PerturbedLoraArgs
from networks.layers.copies import cast_input, weights_in
from networks.layers.lora import LoraLayer
from networks.layers.lora_fa import LoraFaLayer
from networks.layers.lora_ggpo import PerturbedLoraLayer
from networks.layers.product import add_product

WIDTH, ROWS, RANK = 12, (8, 6, 10), 4


class Fused(nn.Module):
    """Linear layers with one input and one LoRA layer, attached as networks attach theirs."""

    def __init__(self, rows=ROWS, kind=LoraLayer, args=None, alpha=2.0, dtype=torch.float32):
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        self.base = nn.ModuleList(nn.Linear(WIDTH, n) for n in rows)
        self.lora = kind.build(list(self.base), RANK, alpha, args or LoraArgs())
        self.lora.init_weights(rng)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.5)
        self.base.to(dtype).requires_grad_(False)
        for parameter in self.lora.parameters():
            parameter.requires_grad_(id(parameter) in {id(one) for one in self.lora.trained_parameters()})
        for index, layer in enumerate(self.base):
            if self.lora.shares_input:
                layer.register_forward_pre_hook(cast_input)
            layer.register_forward_hook(lambda _, args, output, i=index: self.lora.adapt_into(i, args[0], output))

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.base], dim=-1)

    def bare(self, x):
        return torch.cat([F.linear(x, layer.weight, layer.bias) for layer in self.base], dim=-1)

    def gradients(self):
        return [parameter.grad for parameter in self.lora.parameters() if parameter.requires_grad]


def given(requires_grad=True):
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    # no leaf, as in a model
    return x.requires_grad_(requires_grad), (lambda one: one * 1.0) if requires_grad else (lambda one: one)


def trained(model, *, bf16=False, copies=False, again=False):
    """Outputs, then the gradients of the input and of what is trained."""
    for parameter in model.lora.parameters():
        parameter.grad = None
    x, after = given()
    call = (lambda one: checkpoint(model, one, use_reentrant=False)) if again else model
    with weights_in(model.lora, torch.bfloat16) if copies else nullcontext():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = call(after(x))
        output.float().square().mean().backward()
    return [output.detach().float(), x.grad, *model.gradients()]


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_the_added_product_is_exact(factor):
    """Against autograd on the plain expression, in float64: 1e-12 is its rounding over ten products."""
    rng = torch.Generator().manual_seed(0)
    shapes = (2, 3, 7), (2, 3, 4), (7, 4)
    tensors = [torch.randn(shape, generator=rng, dtype=torch.float64, requires_grad=True) for shape in shapes]
    output, hidden, up = tensors
    weights = torch.randn(2, 3, 7, generator=rng, dtype=torch.float64)
    own = add_product(output, hidden, up, factor)
    plain = output + factor * hidden @ up.T
    torch.testing.assert_close(own, plain, rtol=1e-12, atol=1e-12)
    # a gradient whose rows are not one after the other, as that of attention's heads
    strange = weights.transpose(0, 1).contiguous().transpose(0, 1)
    found, expected = (torch.autograd.grad(one, tensors, strange) for one in (own, plain))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["fused", "single"])
def test_outputs_and_gradients_in_float32_are_those_of_the_formula(rows):
    """1e-6 relative, of each tensor's largest value: the sums are taken in another order."""
    model = Fused(rows)
    found = trained(model)
    x, after = given()
    down, up = (one.weight.detach().clone().requires_grad_() for one in (model.lora.lora_down, model.lora.lora_up))
    output = model.bare(x) + 2 / RANK * after(x) @ down.T @ up.T
    output.square().mean().backward()
    for one, expected in zip(found, [output.detach(), x.grad, down.grad, up.grad], strict=True):
        assert (one - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", [LoraLayer, LoraFaLayer], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["fused", "single"])
def test_in_bf16_copies_are_no_further_from_float32_than_autocast(rows, kind, again):
    model = Fused(rows, kind)
    exact, plain, copied = (
        trained(model),
        trained(model, bf16=True),
        trained(model, bf16=True, copies=True, again=again),
    )
    assert model.lora.copies is None
    assert [one.dtype for one in copied] == [torch.float32] * len(exact)

    def off(found):
        return sum(((one - own).norm() / own.norm()).item() for one, own in zip(found, exact, strict=True))

    assert 0 < off(copied) < 1.1 * off(plain)  # both round at the same places, and sum in another order


def test_checkpointing_changes_no_bit():
    model = Fused()
    assert all(
        map(torch.equal, trained(model, bf16=True, copies=True), trained(model, bf16=True, copies=True, again=True))
    )


def test_dropouts_of_fused_parts_are_drawn_as_without_copies():
    model = Fused(args=LoraArgs(dropout=0.3, rank_dropout=0.2, module_dropout=0.1))
    seen = []
    for copies in (False, True):
        torch.manual_seed(5)
        seen.append(trained(model, bf16=True, copies=copies))
    for one, other in zip(*seen, strict=True):
        assert ((one == 0) == (other == 0)).all()
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.01 * one.abs().max().item())  # bf16


def test_a_part_that_is_not_called_has_no_gradient_and_rows_of_one_have_zeros():
    model = Fused()
    x, _ = given()
    with weights_in(model.lora, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            output = model.base[1](x)
        output.float().sum().backward()
    rows = model.lora.lora_up.weight.grad.abs().sum(1) > 0
    assert rows.tolist() == [False] * 8 + [True] * 6 + [False] * 10
    other = Fused()
    pair = nn.ModuleList([model.lora, other.lora])
    model.zero_grad()
    with weights_in(pair, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        output.float().sum().backward()
    assert all(parameter.grad is None for parameter in other.lora.parameters())


def test_weights_that_have_the_dtype_are_not_copied():
    model = Fused(dtype=torch.bfloat16)
    model.lora.to(torch.bfloat16)
    with weights_in(model.lora, torch.bfloat16):
        assert model.lora.copies is None
    with weights_in(model.lora, torch.float16):
        assert [one.dtype for one in model.lora.copies] == [torch.float16] * 4


def test_copies_go_when_the_batch_fails():
    model = Fused()
    with pytest.raises(ZeroDivisionError), weights_in(model.lora, torch.bfloat16):
        raise ZeroDivisionError
    assert model.lora.copies is None


def test_what_was_computed_for_other_weights_is_not_used_again():
    """The input and the layer are the same, its weights are not."""
    model, (x, _) = Fused(), given(requires_grad=False)
    zero = torch.zeros(2, 5, ROWS[0])
    before = model.lora.adapt(0, x, zero)
    with torch.no_grad():
        model.lora.lora_down.weight.mul_(2)
    torch.testing.assert_close(model.lora.adapt(0, x, zero), 2 * before)


def test_an_output_is_overwritten_only_where_that_is_allowed():
    rng = torch.Generator().manual_seed(0)
    output, hidden, up = (torch.randn(shape, generator=rng) for shape in ((5, 7), (5, 4), (7, 4)))
    before, expected = output.clone(), output + 0.5 * hidden @ up.T
    torch.testing.assert_close(add_product(output, hidden, up, 0.5), expected)
    assert torch.equal(output, before)
    result = add_product(output, hidden, up, 0.5, into=True)
    torch.testing.assert_close(result, expected)
    assert result.data_ptr() == output.data_ptr()
    columns = before.T.contiguous().T
    torch.testing.assert_close(add_product(columns, hidden, up, 0.5, into=True), expected)
    assert torch.equal(columns, before)


def test_who_has_saved_an_output_that_is_overwritten_is_told():
    output = torch.randn(5, 7, requires_grad=True) * 2
    saved = output.square()
    result = add_product(output, torch.ones(5, 4), torch.ones(7, 4), 1.0, into=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (saved.sum() + result.sum()).backward()


def test_disturbed_layers_get_inputs_as_they_are():
    """Their noise is drawn in the dtype of the input."""
    args = PerturbedLoraArgs(ggpo_sigma=0.1, ggpo_beta=0.1)
    disturbed = PerturbedLoraLayer.build([nn.Linear(4, 4)], 2, 1.0, args)
    assert not disturbed.shares_input
    assert LoraLayer.shares_input


# ---- operations


class Operations(TorchDispatchMode):
    """Those that compute: no views, and nothing that reserves memory."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = any(one.alias_info is not None and not one.alias_info.is_write for one in function._schema.returns)
        name = function._schema.name.removeprefix("aten::")
        if not views and not name.startswith(("empty", "new_empty", "_unsafe_view")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def operations(model, *, x_grad=True, bf16=True):
    """Of a forward and backward pass, less those of the model without LoRA."""
    counts = []
    for adapted in (True, False):
        x, after = given(requires_grad=x_grad or not adapted)
        stream = after(x)
        call = (
            model if adapted else lambda one: torch.cat([F.linear(one, m.weight, m.bias) for m in model.base], dim=-1)
        )
        with weights_in(model.lora, torch.bfloat16) if adapted else nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                with Operations() as seen:
                    output = call(stream)
                total = output.float().sum()
            with Operations() as back:
                total.backward()
        counts.append([*seen.names, *back.names])
    return len(counts[0]) - len(counts[1]), counts


@pytest.mark.parametrize("alpha", [RANK, 1.0])
@pytest.mark.parametrize(("rows", "most"), [(ROWS[:1], 8), (ROWS, 12)], ids=["single", "fused"])
def test_operations_of_a_layer(rows, most, alpha):
    """Two and five for a linear layer, and one that casts all gradients of a network; fewer for each of three.

    The base casts one float32 input for each of its three modules, and the gradient of each; here that is done once.
    """
    added, seen = operations(Fused(rows, alpha=alpha, dtype=torch.bfloat16))
    assert added <= most, seen
