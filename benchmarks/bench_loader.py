"""How fast batches come: images decoded and resized, or latents read from files, with 0, 2 and 4 data workers.

    python benchmarks/bench_loader.py

Workers stay between epochs, and the first epoch is not timed. The numbers of workers take turns, so that a machine's
mood falls on all of them. There are never more workers than cores: on two cores, 4 asked for are 2.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from images import write_images
from torch import Tensor

from library import registry
from library.caching import latents
from library.caching.encode_missing import Encoder
from library.data.config.blueprint import build_specs
from library.data.sample.dataset import TrainingData, build_training_data
from library.families.sd.options import TRAITS
from library.options import parsing
from library.runtime import logs
from library.types import CacheLayout

WORKERS = (0, 2, 4)
ROUNDS = 3
SIZES = ((1024, 768), (768, 1024), (1152, 768))


def read_data(folder: Path, index: Path) -> TrainingData:
    arguments = [f"--train_data_dir={folder}", f"--data_index_dir={index}", "--resolution=512", "--enable_bucket"]
    arguments += ["--train_batch_size=4", "--persistent_data_loader_workers"]
    opts = parsing.parse_options(registry.groups_for("sd", "network"), arguments)
    return build_training_data(build_specs(opts, TRAITS), opts, TRAITS, seed=1)


def pooled(pixels: Tensor, _: object) -> Tensor:
    """Stands in for a VAE: (B, 3, H, W) to (B, 4, H/8, W/8)."""
    small = torch.nn.functional.avg_pool2d(pixels, 8)
    return torch.cat([small, small.mean(1, keepdim=True)], 1)


def cache(data: TrainingData) -> TrainingData:
    encoder = Encoder(pooled, 4, 1, progress=partial(logs.progress, disable=True))
    layout = CacheLayout("_bench.npz", 4, False)
    result = latents.cache_on_disk(data.records, data.index, encoder, layout, "no VAE")
    data.set_latents(result.entries, in_memory=False)
    return data


def epoch_seconds(data: TrainingData, epoch: int, workers: int) -> float:
    start = time.perf_counter()
    for batch in data.loader(epoch, workers=workers):
        assert batch.pixels is not None or batch.latents is not None
    return time.perf_counter() - start


def measure(name: str, sets: dict[int, TrainingData]) -> None:
    """One set of data for each number of workers, as each keeps its workers."""
    times: dict[int, list[float]] = {workers: [] for workers in sets}
    for epoch in range(1, ROUNDS + 2):
        for workers, data in sets.items():
            seconds = epoch_seconds(data, epoch, workers)
            if epoch > 1:
                times[workers].append(seconds)
    for workers, seconds in times.items():
        count = len(sets[workers].items)
        ratio = statistics.median(alone / own for alone, own in zip(times[0], seconds, strict=True))
        print(f"{name}, {workers} workers: {ratio:.2f} times as fast as none; {count / min(seconds):.0f} images/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as data workers have it
    with tempfile.TemporaryDirectory() as temporary:
        folder, index = Path(temporary, "images"), Path(temporary, "index")
        write_images(folder / "1_x", args.images, lambda number: SIZES[number % 3], kinds=("jpg",))
        measure("JPEG images of 0.8 megapixels", {workers: read_data(folder, index) for workers in WORKERS})
        (folder / "1_x").rename(folder / "10_x")  # reading latents is so quick that one epoch needs more of it
        measure("latents in files", {workers: cache(read_data(folder, index)) for workers in WORKERS})


if __name__ == "__main__":
    main()
