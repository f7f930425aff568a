"""Weights in 8-bit whole numbers and in NF4: how far they are off, what they take, and that layers compute the same."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import norm
from torch import nn

from library.errors import UserError
from library.memory import quantised
from library.memory.block_swap import BlockSwap
from library.memory.quantised import INT8_BLOCK, NF4_BLOCK, from_int8, from_nf4, quantise_frozen_to, to_int8, to_nf4
from tests.memory.test_block_swap import Case, assert_same, flux_step, most, tiny_flux, unet_step
from tests.networks.conftest import tiny_unet

pytest.importorskip("bitsandbytes")

FORMS = {"int8": (to_int8, from_int8, INT8_BLOCK), "nf4": (to_nf4, from_nf4, NF4_BLOCK)}
BYTES = {"int8": 1 + 4 / 256, "nf4": 1 / 2 + 4 / 64}  # for a weight, scales counted
NARROW = (torch.float16, torch.bfloat16)

pytestmark = pytest.mark.parametrize("form", FORMS)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def nf4_levels() -> torch.Tensor:
    """By their definition: 7 negative and 8 positive quantiles of the normal distribution, and 0; the largest is 1."""
    outermost = 0.9677083
    ends = [torch.linspace(outermost, 0.5, count + 1, dtype=torch.float64)[:-1] for count in (7, 8)]
    below, above = (torch.from_numpy(norm.ppf(end.numpy())) for end in ends)
    levels = torch.cat([-below, torch.zeros(1), above.flip(0)])
    return (levels / levels.max()).float()


LEVELS = {"int8": torch.arange(-127, 128) / 127, "nf4": nf4_levels()}
WORST = {"int8": 1 / 254, "nf4": 0.152}  # of the largest in the block, half of the widest gap


def off(weight: torch.Tensor, form: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Errors in parts of the largest weight of the block, (blocks, weights in a block)."""
    quantise, dequantise, block = FORMS[form]
    kept = dequantise(*quantise(weight), weight.shape, dtype)
    assert kept.shape == weight.shape
    assert kept.dtype == dtype
    blocks = weight.float().view(-1, block)
    return (kept.float().view(-1, block) - blocks) / blocks.abs().amax(1, keepdim=True)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_every_weight_becomes_the_nearest_level_of_its_block(form, size):
    weight = size * random(128, 64)
    weight[5] *= 1000  # other blocks do not care
    errors = off(weight, form)
    blocks = weight.view(-1, FORMS[form][2])
    parts = blocks / blocks.abs().amax(1, keepdim=True)
    nearest = (parts[..., None] - LEVELS[form]).abs().amin(-1)
    assert (errors.abs() <= nearest + 0.01 * WORST[form]).all()
    assert errors.abs().max() <= 1.01 * WORST[form]
    if form == "nf4":
        assert errors[parts.abs() < 0.5].abs().max() <= 0.066


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_formats_are_read_and_given(form, dtype):
    weight = random(64, 64).to(dtype)
    rounding = 2 * torch.finfo(dtype).eps
    assert off(weight, form, dtype).abs().max() <= 1.01 * WORST[form] + rounding
    assert off(weight.double(), form, torch.float64).abs().max() <= 1.01 * WORST[form], "other formats, too"


def test_zeros_stay_zeros(form):
    quantise, dequantise, block = FORMS[form]
    weight = torch.zeros(4, block)
    weight[1, 0] = 1e-38
    kept = dequantise(*quantise(weight), weight.shape, torch.float32)
    torch.testing.assert_close(kept, weight, rtol=0, atol=1e-40)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (33, 7), (5, 3, 3, 3), (64, 64)])
def test_blocks_that_are_not_full(form, shape):
    quantise, dequantise, block = FORMS[form]
    weight = random(*shape)
    bits, scales = quantise(weight)
    kept = dequantise(bits, scales, weight.shape, torch.float32)
    assert kept.shape == weight.shape
    assert scales.numel() == -(-weight.numel() // block)
    assert (kept - weight).abs().max() <= 1.01 * WORST[form] * weight.abs().max()


def test_what_a_weight_takes(form):
    layer = nn.Linear(256, 320, bias=False).requires_grad_(False)
    quantise_frozen_to(layer, form)
    assert list(layer.parameters()) == []
    assert sum(kept.nbytes for kept in layer.buffers()) == BYTES[form] * 256 * 320
    assert layer.state_dict() == {}, "as with 8-bit floats: what is not trained is not saved"


LAYERS = {
    "linear": (nn.Linear(24, 40), (2, 5, 24)),
    "linear without bias": (nn.Linear(24, 40, bias=False), (3, 24)),
    "convolution": (nn.Conv2d(8, 6, 3, stride=2, padding=1), (2, 8, 9, 9)),
    "groups": (nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, bias=False), (2, 8, 9, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_a_layer_with_the_rounded_weight(form, name):
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer).requires_grad_(False)
    plain = copy.deepcopy(layer)
    assert quantise_frozen_to(layer, form) == 1
    plain.weight.copy_(layer.weight)
    results = [trained(module, random(*shape)) for module in (layer, plain)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


def trained(model, x: torch.Tensor, step=None) -> tuple[torch.Tensor, torch.Tensor]:
    given = x.clone().requires_grad_()
    out = model(given) if step is None else step(model, given)
    out.square().sum().backward()
    return out.detach(), given.grad


def test_the_computation_is_in_autocasts_format(form):
    layer = nn.Linear(64, 8).requires_grad_(False)
    quantise_frozen_to(layer, form)
    layer.to(torch.bfloat16)
    x = random(4, 64).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, layer.weight.float().sum(0).expand(4, 64), rtol=1e-2, atol=1e-2)


def test_casts_and_moves_keep_every_bit(form):
    layer = nn.Linear(64, 8).requires_grad_(False)
    quantise_frozen_to(layer, form)
    before = [kept.clone() for kept in layer.buffers()]
    layer.to(torch.bfloat16).half().to("cpu", torch.bfloat16)
    assert_same(list(layer.buffers()), before)
    assert layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    layer.to("meta")
    assert {tensor.device.type for tensor in (*layer.buffers(), *layer.parameters())} == {"meta"}


def test_only_the_small_weights_are_kept_for_the_backward_pass(form):
    stack = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))).requires_grad_(False)
    quantise_frozen_to(stack, form)
    kept: dict[int, int] = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        stack(torch.randn(1, 64, requires_grad=True))
    assert sum(kept.values()) == BYTES[form] * 4 * 64 * 64


def test_hooks_and_the_layers_themselves_stay(form):
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1, padding="same"), nn.Embedding(3, 4), nn.LayerNorm(4))
    model.requires_grad_(False)
    first = model[0]
    first.register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(2, 4)
    assert quantise_frozen_to(model, form) == 1, "only the linear layer: the others are not plain, or not of this kind"
    assert model[0] is first
    assert isinstance(first, nn.Linear)
    torch.testing.assert_close(first(x), nn.functional.linear(x, first.weight, first.bias) + 1)


def test_trained_weights_are_refused(form):
    with pytest.raises(ValueError, match="cannot be trained"):
        quantise_frozen_to(nn.Linear(2, 2), form)


def test_a_library_that_does_not_work_is_reported_in_one_line(form, monkeypatch):
    name = {"int8": "dequantize_blockwise", "nf4": "dequantize_4bit"}[form]

    def broken(*args, **kwargs):
        raise RuntimeError("no compiled half\nand more lines")

    layer = nn.Linear(2, 2).requires_grad_(False)
    monkeypatch.setattr(quantised.bnb, name, broken)
    with pytest.raises(UserError, match=r"--quantize_base: .* on cpu: RuntimeError: no compiled half; .* choose fp8$"):
        quantise_frozen_to(layer, form)
    monkeypatch.setattr(quantised.bnb, name, lambda bits, state: torch.full((256,), torch.nan))
    with pytest.raises(UserError, match="wrong numbers"):
        quantise_frozen_to(layer, form)
    assert type(layer) is nn.Linear


WHOLE = {"unet": (tiny_unet, unet_step), "flux": (tiny_flux, flux_step)}
WORST_OF_WHOLE = {"int8": 0.02, "nf4": 0.4}  # errors of every layer add up; these random models show half of it


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_denoiser(form, kind):
    make, step = WHOLE[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exact = make().requires_grad_(False)
    model, rounded = copy.deepcopy(exact), copy.deepcopy(exact)
    count = sum(isinstance(layer, nn.Linear | nn.Conv2d) for layer in exact.modules())
    assert quantise_frozen_to(model, form) == count
    for layer, plain in zip(model.modules(), rounded.modules(), strict=True):
        if hasattr(layer, "weight_bits"):
            plain.weight.copy_(layer.weight)
    first, second, third = (step(each, 0) for each in (model, rounded, exact))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    assert 0 < (first - third).norm() / third.norm() < WORST_OF_WHOLE[form]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_training_a_network_beside_it(form, kind, checkpointing):
    """With swapped blocks and without, checkpointed and not: the gradients of a LoRA beside the rounded weights."""

    def case(rounded: bool = False, checkpointing: bool = False) -> Case:
        made = Case(kind, checkpointing)
        small = copy.deepcopy(made.model) if rounded else made.model
        quantise_frozen_to(small, form)
        for layer, plain in zip(small.modules(), made.model.modules(), strict=True):
            if rounded and hasattr(layer, "weight_bits"):
                plain.weight.copy_(layer.weight)
        return made

    expected = case(rounded=True).train(1)
    got = case(checkpointing=checkpointing).train(1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    swapped = case(checkpointing=checkpointing)
    swap = swapped.swap(most(swapped))
    assert {torch.uint8, torch.int32} <= {piece.tensor.dtype for block in swap._blocks for piece in block.tensors}
    assert_same(swapped.train(1), got)
    assert swap.bytes_written_back == 0


def test_swapped_blocks_are_as_much_smaller(form):
    blocks = [nn.Linear(256, 256, bias=False).requires_grad_(False) for _ in range(5)]
    for block in blocks:
        quantise_frozen_to(block, form)
    assert BlockSwap(blocks, 3, torch.device("cpu")).bytes_saved == 3 * BYTES[form] * 256 * 256


def test_it_compiles_into_one_graph(form):
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)).requires_grad_(False)
    quantise_frozen_to(model, form)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            got = trained(compiled, random(3, 64))
        torch.testing.assert_close(got, trained(model, random(3, 64)))
        assert max(kept) <= 64 * 32 * 1.1, "no wide weight is kept for the backward pass"
    finally:
        torch._dynamo.reset()


@pytest.mark.gpu
def test_on_a_gpu(form):
    """Computed there, kept where the weights are, and moved without a change."""
    device = torch.device("cuda")
    layer = nn.Linear(256, 96).requires_grad_(False)
    exact = layer.weight.clone()
    quantise_frozen_to(layer, form, device)
    assert {kept.device.type for kept in layer.buffers()} == {"cpu"}
    on_cpu = layer.weight
    assert (on_cpu - exact).abs().max() <= 1.01 * WORST[form] * exact.abs().max()
    layer.to(device)
    torch.testing.assert_close(layer.weight.cpu(), on_cpu, rtol=1e-6, atol=0)
    plain = nn.Linear(256, 96).requires_grad_(False).to(device)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    for dtype in (torch.float32, *NARROW):
        layer.to(dtype), plain.to(dtype)
        x = random(3, 256).to(device, dtype)
        torch.testing.assert_close(trained(layer, x), trained(plain, x), rtol=2e-2, atol=1e-2)
