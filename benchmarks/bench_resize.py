"""Resizing an SDXL LoRA of rank 128 against a full SVD of each layer's product, with random weights.

    python benchmarks/bench_resize.py

One layer of each shape is measured, in turns, and counted as often as SDXL has it. Times are those of the processor, so
that other work on the machine does not show; what counts is the ratio.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from library.model_tools import low_rank

RANK, NEW_RANK = 128, 32
# (outputs, inputs) -> how many layers of it a network of SDXL has: U-Net, then text encoders.
SDXL = {
    (640, 640): 70,
    (640, 2048): 20,
    (5120, 640): 10,
    (640, 2560): 10,
    (1280, 1280): 372 + 128,
    (1280, 2048): 120,
    (10240, 1280): 60,
    (1280, 5120): 60 + 32,
    (768, 768): 48,
    (3072, 768): 12,
    (768, 3072): 12,
    (5120, 1280): 32,
}
TINY = {(64, 48): 2, (96, 64): 1}


def plain(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(up @ down, full_matrices=False)
    return u[:, :NEW_RANK] * s[:NEW_RANK], vh[:NEW_RANK]


def ours(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return low_rank.svd_of_product(up, down).factors(NEW_RANK)


def measure(shapes: dict[tuple[int, int], int], rank: int = RANK) -> tuple[float, float, float]:
    """Processor seconds for all layers here, and by full SVDs; the largest difference of results by their largest."""
    rng, total, difference = torch.Generator().manual_seed(0), {ours: 0.0, plain: 0.0}, 0.0
    for (out, width), count in shapes.items():
        up, down = torch.randn(out, rank, generator=rng), torch.randn(rank, width, generator=rng)
        products = []
        for way, seconds in total.items():
            if way is ours:  # the first call of a size takes its memory; full SVDs take too long for two
                way(up, down)
            start = time.process_time()
            factors = way(up, down)
            total[way] = seconds + count * (time.process_time() - start)
            products.append(factors[0] @ factors[1])
        difference = max(difference, float((products[0] - products[1]).abs().max() / products[1].abs().max()))
    return total[ours], total[plain], difference


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small layers, to see that it runs")
    tiny = parser.parse_args().tiny
    ours(torch.randn(8, 2), torch.randn(2, 8))  # the first call loads libraries
    seconds, full, difference = measure(TINY if tiny else SDXL, 4 if tiny else RANK)
    print(f"ours {seconds:.1f} s, full SVD {full:.0f} s: {full / max(seconds, 1e-9):.0f} times as fast")
    print(f"results differ by {difference:.0e} of the largest value")
