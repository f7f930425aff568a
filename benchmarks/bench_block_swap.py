"""What it costs to keep blocks in CPU memory: seconds of a LoRA step, by --blocks_to_swap.

    python benchmarks/bench_block_swap.py
    python benchmarks/bench_block_swap.py --full --counts 0 20 40 55

A transformer of the shape of FLUX.1 with random weights in bf16, gradient checkpointing, batch 1, and a LoRA on every
linear layer of its blocks. On a GPU the blocks are as wide as the real ones, and there are 8 + 16 of them, 10 GiB; with
--full all 19 + 38, 22 GiB, so leave out the count 0 where they do not fit. On a CPU it is a toy in float32 that only
shows that the command works.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from library.memory.block_swap import BlockSwap
from library.types import LoraTarget, Models
from networks.build import DeclaredBuilder
from networks.lora import MODULE

GIB = 2**30
TEXT_TOKENS = 512


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build(doubles: int, singles: int, heads: int, device: torch.device) -> FluxTransformer2DModel:
    """On the CPU; the random numbers are drawn on `device`, which is faster."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=doubles, num_single_layers=singles, num_attention_heads=heads)
    model = model.to(dtype_on(device)).to_empty(device="cpu").requires_grad_(False).train()
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, device=device, dtype=parameter.dtype) * 0.02)
    model.enable_gradient_checkpointing()
    return model


def blocks_of(model: FluxTransformer2DModel) -> list[nn.Module]:
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def add_lora(model: FluxTransformer2DModel, device: torch.device) -> nn.Module:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "blocks." in name]
    targets = [LoraTarget("lora_" + name.replace(".", "_"), "denoiser", (name,)) for name in names]
    models = Models(model, {}, {}, None, None)
    network = DeclaredBuilder(MODULE).create(targets, models, dim=16, alpha=16.0, dropout=None, args={}, seed=0)
    network.attach(models)
    return network.to(device)


def make_step(model: FluxTransformer2DModel, network: nn.Module, side: int, device: torch.device) -> Callable[[], None]:
    tokens = (side // 16) ** 2
    noisy = torch.randn(1, tokens, model.config.in_channels, device=device)
    words = TEXT_TOKENS if device.type == "cuda" else 16
    text = torch.randn(1, words, model.config.joint_attention_dim, device=device)
    pooled = torch.randn(1, model.config.pooled_projection_dim, device=device)
    places = torch.zeros(tokens, 3, device=device)
    places[:, 1], places[:, 2] = torch.arange(tokens) // (side // 16), torch.arange(tokens) % (side // 16)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            out = model(
                noisy,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=torch.full((1,), 0.5, device=device),
                img_ids=places,
                txt_ids=torch.zeros(words, 3, device=device),
            ).sample
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds of a step, the median; the first two are not counted."""
    taken = []
    for _ in range(steps + 2):
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", help="blocks to swap; by default 0, 10, 20 and so on, and all")
    parser.add_argument("--side", type=int, help="pixels of the square image; by default 1024, on a CPU 64")
    parser.add_argument("--steps", type=int, help="timed steps of each count; by default 10, on a CPU 2")
    parser.add_argument("--full", action="store_true", help="all 19 + 38 blocks")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    doubles, singles = (19, 38) if args.full else (8, 16) if gpu else (3, 5)
    model = build(doubles, singles, 24 if gpu else 1, device)
    network = add_lora(model, device)
    step = make_step(model, network, args.side or (1024 if gpu else 64), device)
    most = doubles + singles - 2
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if gpu else 'CPU'}, weights {size / GIB:.2f} GiB")
    print("| blocks swapped | s/step | over the first | GiB copied per step | peak GiB on the device |")
    print("|---|---|---|---|---|")
    first = None
    for count in args.counts or sorted({*range(0, most, 10 if gpu else 3), most}):
        swap = BlockSwap(blocks_of(model), count, device)
        swap.attach()
        model.to(device)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        steps = args.steps or (10 if gpu else 2)
        seconds = measure(step, steps, device)
        first = first or seconds
        copied = swap.bytes_moved / (steps + 2) / GIB
        peak = f"{torch.cuda.max_memory_allocated() / GIB:.1f}" if gpu else "-"
        print(f"| {count} | {seconds:.3f} | {seconds / first:.2f} | {copied:.2f} | {peak} |", flush=True)
        swap.detach()
        model.to("cpu")
        if gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
