"""How many operations a step of the published models takes: ceilings, so that they do not creep up again.

Small models of the published widths are extended to the published depth, on tensors without content. What peft and the
bare model take was measured by `benchmarks/bench_ops.py` (2026-11-29).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
PEFT = {"flux-lora": 17_859, "sdxl-lora": 17_270, "sd35-lora": 17_448}
BARE = {"flux-lora": 8_930, "sdxl-lora": 5_746, "sd35-lora": 7_662}


@pytest.fixture
def bench_ops(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_ops

    return bench_ops


@pytest.mark.parametrize(
    "name", ["flux-lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd35-lora", "sdxl-lora"))]
)
def test_lora_takes_at_most_three_quarters_of_the_operations_of_peft(bench_ops, name):
    seen = bench_ops.measure("ours", bench_ops.CASES[name], full=False)
    assert seen.layers == {"flux-lora": 494, "sd35-lora": 529, "sdxl-lora": 722}[name]
    assert seen.ops <= 0.75 * PEFT[name]
    assert seen.ops - BARE[name] <= 8 * seen.layers


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most", "gib"), [("flux-full", 24_900, 25.4), ("sdxl-full", 17_350, 7.2)])
def test_whole_models_stepped_in_the_backward_pass_take_no_more_than_measured(bench_ops, name, most, gib):
    seen = bench_ops.measure("ours", bench_ops.CASES[f"{name}, checkpointing"], full=False)
    assert seen.ops <= most
    assert seen.peak <= gib * 2**30


@pytest.mark.slow
def test_selective_checkpointing_repeats_less_and_takes_far_less_than_none(bench_ops):
    """Of FLUX.1, which takes 12,079 operations and 52.0 GiB without checkpointing, 16,563 and 25.4 with it."""
    seen = bench_ops.measure("ours", bench_ops.CASES["flux-lora, selective"], full=False)
    assert seen.ops <= 14_300
    assert seen.peak <= 30 * 2**30


def test_views_and_reserved_memory_are_no_operations_and_what_is_alive_is_counted(bench_ops):
    piece = 4096  # 1,000 numbers, in multiples of 512 bytes
    with bench_ops.played(), bench_ops.watched() as (watcher, ops):
        x = torch.empty(100, 10)
        ops.clear()
        with watcher.phase("here") as phase:
            y = x.view(10, 100).t().reshape(-1) + 1  # a copy and a sum
            z = y[:10].add_(1)
        assert ops.total() == 3
        assert (watcher.in_use("cpu"), phase.peaks["cpu"].size) == (2 * piece, 3 * piece)
        del x
        assert watcher.in_use("cpu") == piece
        del y, z
        assert watcher.in_use("cpu") == 0


def test_an_extension_is_what_a_deeper_model_takes(bench_ops):
    """From one and two single blocks to four; and four themselves."""
    row = bench_ops.task(bench_ops.CASES["flux-lora"])
    config = {**row.model.config, **row.model.tiny, "num_layers": 1}

    def measured(blocks):
        model = replace(row.model, config={**config, "num_single_layers": blocks})
        return bench_ops.measure_one("ours", replace(row, model=model), ())

    one, two, four = map(measured, (1, 2, 4))
    extended = one.plus(two, one, 3)
    assert (extended.ops, extended.layers, extended.resident) == (four.ops, four.layers, four.resident)
    assert extended.peak == pytest.approx(four.peak, rel=0.02)
