"""Compiled blocks: the same numbers, hooks included, and one graph for each kind of block and shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.families.sd.adapter import SdFamily
from library.families.sd.targets import unet_targets
from library.memory.compiling import Compiling, compile_blocks, not_one_graph, require_backend, set_cuda_modes
from library.memory.low_precision import quantise_to_fp8
from library.options.memory import MemoryOptions
from library.types import Models
from tests.builders.options import options_with
from tests.networks.builders import lora
from tests.networks.conftest import tiny_unet

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        rng = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.inner.weight, generator=rng)
        nn.init.zeros_(self.inner.bias)

    def forward(self, x):
        return x + self.inner(x).tanh()


def run(blocks, x):
    given = x.clone().requires_grad_()
    out = given
    for block in blocks:
        out = block(out)
    out.square().sum().backward()
    return out.detach(), given.grad


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_hooks_act_and_numbers_stay(backend):
    blocks = [Block(seed).requires_grad_(False) for seed in range(3)]
    adapter = nn.Parameter(torch.full((8,), 0.5))
    blocks[1].inner.register_forward_hook(lambda module, args, output: output + adapter * args[0])
    x = torch.randn(4, 8)
    plain, trained = run(blocks, x), adapter.grad.clone()
    adapter.grad = None
    compile_blocks(blocks, backend, CPU)
    torch.testing.assert_close(run(blocks, x), plain)
    torch.testing.assert_close(adapter.grad, trained)
    adapter.grad = None
    with torch.no_grad():
        adapter.zero_()  # as an optimizer steps: what is compiled follows
    bare = run([Block(seed) for seed in range(3)], x)
    torch.testing.assert_close(run(blocks, x), bare)


def test_each_shape_is_compiled_once_for_all_blocks_alike(monkeypatch):
    graphs = []

    def counting(graph, inputs):
        graphs.append([tuple(one.shape) for one in inputs if isinstance(one, torch.Tensor)])
        return graph.forward

    monkeypatch.setattr("library.memory.compiling.require_backend", lambda *_: None)  # whose probe would be counted
    blocks = [Block(seed).requires_grad_(False) for seed in range(12)]
    compile_blocks(blocks, counting, CPU)
    for rows in (2, 3, 5, 7, 2, 3, 5, 7):
        run(blocks, torch.randn(rows, 8))
    assert len(graphs) <= 2 * 4  # the first block's input is a leaf, and so guarded apart from the others'
    assert len(graphs) >= 4


def test_more_kinds_than_torchs_own_limit_are_compiled():
    counters = torch._dynamo.utils.counters
    counters.clear()
    blocks = [Block(0).requires_grad_(False)]
    compile_blocks(blocks, "eager", CPU)
    before = counters["stats"]["unique_graphs"]
    for rows in range(2, 22):
        run(blocks, torch.randn(rows, 8))
    assert counters["stats"]["unique_graphs"] - before == 20


@pytest.mark.rows("R508")
@pytest.mark.parametrize(("dynamic", "graphs"), [("false", 6), ("true", 1), ("auto", 2), (None, 6)])
def test_one_graph_for_each_shape_or_for_several(dynamic, graphs):
    given = {} if dynamic is None else {"compile_dynamic": dynamic}
    opts = options_with(MemoryOptions, compile=True, compile_backend="eager", **given)
    counters = torch._dynamo.utils.counters
    counters.clear()
    blocks = [Block(0).requires_grad_(False)]
    compile_blocks(blocks, opts.memory.backend, CPU, Compiling.of(opts.memory))
    before = counters["stats"]["unique_graphs"]
    for rows in range(2, 8):
        run(blocks, torch.randn(rows, 8))
    assert counters["stats"]["unique_graphs"] - before == graphs


@pytest.mark.rows("R508")
def test_a_limit_of_graphs_and_blocks_that_are_no_single_graph():
    class Breaking(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x

    opts = options_with(MemoryOptions, torch_compile=True, compile_fullgraph=True, compile_cache_size_limit=2)
    how = Compiling.of(opts.memory)
    blocks = [Breaking()]
    compile_blocks(blocks, "eager", CPU, how)
    assert torch._dynamo.config.recompile_limit == 2
    with pytest.raises(RuntimeError) as stop:
        blocks[0](torch.ones(2))
    assert not_one_graph(stop.value).startswith("--compile_fullgraph: a block cannot be compiled as one graph (")
    assert not_one_graph(RuntimeError("other")) is None
    assert Compiling.of(options_with(MemoryOptions, compile=True, compile_mode="max-autotune").memory).mode


@pytest.mark.rows("R508")
def test_the_switches_of_cuda(caplog):
    backends = torch.backends
    modes = [(backends.cuda.matmul, "allow_tf32"), (backends.cudnn, "allow_tf32"), (backends.cudnn, "benchmark")]
    before = [getattr(place, name) for place, name in modes]
    try:
        for place, name in modes:
            setattr(place, name, False)
        set_cuda_modes(options_with(MemoryOptions).memory, CUDA)
        assert [getattr(place, name) for place, name in modes] == [False] * 3
        memory = options_with(MemoryOptions, cuda_allow_tf32=True, cuda_cudnn_benchmark=True).memory
        set_cuda_modes(memory, CPU)
        assert [getattr(place, name) for place, name in modes] == [False] * 3
        assert "--cuda_allow_tf32: has no effect on cpu" in caplog.text
        set_cuda_modes(memory, CUDA)
        assert [getattr(place, name) for place, name in modes] == [True] * 3
    finally:
        for (place, name), value in zip(modes, before, strict=True):
            setattr(place, name, value)


@pytest.mark.slow
def test_a_network_on_some_layers_of_a_denoiser():
    """Layers that are alike but for their adapters are kept apart, also where they are computed again."""
    models = Models(tiny_unet().requires_grad_(False), {}, {}, None, None)
    unet, targets = models.denoiser, unet_targets(models.denoiser)
    network = lora.create(targets[::3], models, dim=2, alpha=1.0, dropout=None, args={}, seed=0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    network.attach(models)

    def gradients():
        rng = torch.Generator().manual_seed(0)
        noisy, text = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 7, 16, generator=rng)
        network.zero_grad()
        unet(noisy, torch.tensor([10, 900]), text).sample.square().mean().backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    plain = gradients()
    compile_blocks(SdFamily(None).denoiser.blocks(models), "eager", CPU)
    torch.testing.assert_close(gradients(), plain, rtol=1e-3, atol=1e-6)
    unet.enable_gradient_checkpointing()
    unet.train()
    torch.testing.assert_close(gradients(), plain, rtol=1e-3, atol=1e-6)


def test_fp8_layers_compile():
    blocks = [Block(seed).requires_grad_(False) for seed in range(2)]
    for block in blocks:
        quantise_to_fp8(block)
    x = torch.randn(4, 8)
    plain = run(blocks, x)
    compile_blocks(blocks, "aot_eager", CPU)
    torch.testing.assert_close(run(blocks, x), plain)


def test_a_backend_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"--dynamo_backend: torch .* has no backend nvprims_nvfuser here; choose"):
        require_backend("nvprims_nvfuser", CPU)


def test_a_backend_that_does_not_work_is_reported_in_one_line(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler was found\nand more lines")

    torch._dynamo.register_backend(broken, name="broken_for_a_test")
    with pytest.raises(UserError, match=r"works?.*\(no compiler was found\)") as stop:
        require_backend("broken_for_a_test", CPU)
    assert len(stop.value.problems) == 1
    assert "\n" not in stop.value.problems[0]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_inductor_on_a_gpu():
    device = torch.device("cuda")
    blocks = [Block(seed).requires_grad_(False).to(device) for seed in range(3)]
    x = torch.randn(4, 8, device=device)
    plain = run(blocks, x)
    compile_blocks(blocks, "inductor", device)
    torch.testing.assert_close(run(blocks, x), plain, rtol=1e-4, atol=1e-5)
