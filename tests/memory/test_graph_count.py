"""The number of graphs that is announced before training is the number that training makes, without breaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.memory import compiling

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def bench_models(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_models

    torch._dynamo.reset()
    yield bench_models
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["flux-lora", "sdxl-lora"])
def test_graphs_are_as_many_as_announced(bench_models, monkeypatch, name):
    row = bench_models.ROWS[name]
    if name == "flux-lora":
        row = replace(row, model=replace(row.model, tiny={**row.model.tiny, "num_layers": 2}))
    monkeypatch.setattr(compiling, "require_backend", lambda *_: None)  # whose probe would be counted
    made = bench_models.assemble(row, (), 1, CPU, tiny=True)
    blocks = made.family.denoiser.blocks(made.models)
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    compiling.compile_blocks(blocks, counting, CPU)
    each = compiling.graphs_per_shape(blocks, input_has_gradient=False) + made.family.traits.extra_graphs
    assert name != "flux-lora" or each == 4  # two kinds of blocks, the first one of each by itself
    torch._dynamo.utils.counters.clear()
    made.step()
    assert len(graphs) == each
    made.step()
    assert len(graphs) == each
    assert not torch._dynamo.utils.counters["graph_break"]
