"""The benchmarks that need a GPU for their figures must at least work without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.builders.memory import needs_linux

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("plain", "gc", "compile", "swap-35")
UNET_ROWS = ("sd15-lora", "sdxl-lora", "sdxl-full")
TRIED_ROWS = ("sdxl-lora", "sdxl-full", "flux-fp8")  # a network, a whole model, and a quantised base that is swapped


@pytest.fixture
def bench_models(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_models

    return bench_models


@pytest.mark.slow
def test_rows_of_the_models_run_at_tiny_size():
    command = ["benchmarks/bench_models.py", "--tiny", "--only", *TRIED_ROWS]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    facts, table = run.stdout.split("\n\n")
    assert f"torch {torch.__version__}" in facts
    head, rule, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    assert len(head) == len(rule)
    rows = {(cells[0], cells[1]): dict(zip(head, cells, strict=True)) for cells in lines}
    swapped = {("flux-fp8", "swap-35")}
    assert set(rows) == {(row, variant) for row in TRIED_ROWS for variant in VARIANTS[:-1]} | swapped
    assert [cells["note"] for cells in rows.values()] == [""] * len(rows)
    assert all(float(cells["s/step"]) > 0 for cells in rows.values())
    assert all(cells["against"].endswith(" x plain") for (_, name), cells in rows.items() if name in ("gc", "compile"))
    for row in TRIED_ROWS:
        plain, again, compiled = (float(rows[row, name]["TFLOP"]) for name in ("plain", "gc", "compile"))
        assert compiled == plain
        assert 1.1 * plain < again < 1.6 * plain  # the forward pass once more
    # Training the weights themselves takes their gradients too.
    assert float(rows["sdxl-full", "plain"]["TFLOP"]) > float(rows["sdxl-lora", "plain"]["TFLOP"])


@pytest.mark.slow
def test_preparing_images_runs_and_shows_its_ratios():
    command = ["benchmarks/bench_preparation.py", "--photos=1", "--drawings=2", "--rounds=1"]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("images/s") == 5
    assert run.stderr == ""


@needs_linux
@pytest.mark.slow
def test_tools_merge_and_extract_like_plain_ones_at_tiny_size():
    command = ["benchmarks/bench_tools.py", "--tiny", "--rounds=1"]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "of the change, ours leaves at most 0." in run.stdout
    assert run.stdout.count("MB of memory") == 2
    assert "equal files" in run.stdout
    difference = run.stdout.partition("results differ by at most ")[2].split()[0]
    assert float(difference) < 1e-4


@pytest.mark.slow
def test_networks_are_compared_at_tiny_size():
    types = ["LoHa", "DoRA, columns", "OFT, 4 blocks", "full"]
    command = ["benchmarks/bench_networks.py", "--tiny", "--rounds=1", "--only", *types]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    facts, table = run.stdout.split("\n\n")
    assert f"torch {torch.__version__}" in facts
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    rows = {(cells[0], cells[1]): dict(zip(head, cells, strict=True)) for cells in lines}
    assert set(rows) == {(block, name) for block in ("sdxl", "flux") for name in types}
    for (block, _), cells in rows.items():
        assert all(float(cells[name]) > 0 for name in head if "/" in name and cells[name] != "-")
        trained = [
            int(cells[name].replace(",", "")) for name in ("trained", "trained by lycoris") if cells[name] != "-"
        ]
        assert block == "flux" or len(set(trained)) == 1  # lycoris-lora has no fused layers


def test_live_bytes_are_those_of_tensors_that_are_held(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_networks

    before = torch.ones(1000)
    with bench_networks.LiveBytes() as live:
        first = before * 2
        second = first.view(10, 100) + 1
        del first
        third = second.clone()
    assert (live.now, live.peak) == (8000, 8000)  # two of 4,000 bytes; views and what was there before cost nothing
    del second, third
    assert live.now == 0


def test_full_size_architectures_have_the_published_numbers_of_weights(bench_models):
    sizes = {}
    for name in ("SD15", "SDXL", "SD35_LARGE", "FLUX_DEV"):
        model = getattr(bench_models, name)
        denoiser = bench_models.build_denoiser(model, model.config, torch.device("meta"))
        sizes[name] = sum(weight.numel() for weight in denoiser.parameters())
    published = {"SD15": 0.860e9, "SDXL": 2.567e9, "SD35_LARGE": 8.06e9, "FLUX_DEV": 11.90e9}
    assert sizes == pytest.approx(published, rel=2e-3)


def test_sizes_of_networks_are_those_of_the_layers_they_adapt(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import architectures
    import network_sizes
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    unet = architectures.build_denoiser(architectures.SD15, architectures.SD15.config, torch.device("meta"))
    blocks = [module for module in unet.modules() if isinstance(module, Transformer2DModel)]
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    expected = sum(16 * sum(layer.weight.shape[:2]) for layer in layers)
    alphas = len(layers)
    assert network_sizes.count("sd", network_sizes.ROWS["LoRA"], 16) == (expected, expected + alphas)


def test_a_row_without_memory_says_so_and_the_table_goes_on(bench_models):
    def run():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    seen = bench_models.attempt(run)
    assert not seen.failed
    line = bench_models.line("flux-lora", "plain", seen, None, rate=1e12)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["flux-lora", "plain", *["-"] * 9, "out of memory"]


def test_another_failure_is_reported_and_counts(bench_models):
    def run():
        raise ValueError("first line\nsecond line")

    seen = bench_models.attempt(run)
    assert seen.failed
    assert seen.notes == ["ValueError: first line"]


def test_launches_are_not_made_up_where_there_is_no_gpu(bench_models):
    seen = bench_models.count_launches(lambda: torch.ones(4) + 1, torch.device("cpu"))
    assert seen == (None, None)
