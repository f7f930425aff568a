"""Caching latents against the shortest loop that does it one image at a time, and memory over many images.

    python benchmarks/bench_caching.py

Ours and the loop take turns over the same images with the bundled model's VAE; the figures that count are the
ratios. For memory, a mean over squares stands in for the VAE, and the process must not grow with what it has done.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from images import write_images
from torch import Tensor

from library import cli, registry
from library.caching import latents
from library.caching.encode_missing import Encoder
from library.data.config.blueprint import build_specs
from library.data.sample import images
from library.data.sample.dataset import TrainingData, build_training_data
from library.families.sd.options import TRAITS
from library.options import parsing
from library.runtime import logs
from library.types import CacheLayout

MODEL = ROOT / "examples" / "tiny_model" / "tiny-sd.safetensors"
LAYOUT = CacheLayout(TRAITS.cache_suffix, TRAITS.latent_channels, TRAITS.cache_keys_by_size)
SIZES = ((384, 384), (448, 336), (336, 448))
QUIET = partial(logs.progress, disable=True)

Encode = Callable[[Tensor, list[torch.Generator]], Tensor]


def read_data(folder: Path, resolution: int) -> TrainingData:
    arguments = [f"--train_data_dir={folder}", f"--data_index_dir={folder.parent / 'index'}", "--train_batch_size=4"]
    arguments += [f"--resolution={resolution}", "--enable_bucket", "--min_bucket_reso=64"]
    opts = parsing.parse_options(registry.groups_for("sd", "network"), arguments)
    return build_training_data(build_specs(opts, TRAITS), opts, TRAITS, seed=1)


def vae_of_the_model() -> Encode:
    family, models = cli.load_family("sd", [f"--pretrained_model_name_or_path={MODEL}"])

    @torch.no_grad()
    def encode(pixels: Tensor, rngs: list[torch.Generator]) -> Tensor:
        return family.latents.encode(models, pixels, generator=rngs)

    return encode


def one_by_one(data: TrainingData, encode: Encode) -> Iterator[tuple[Path, Tensor]]:
    """Read, resize, cut out, encode."""
    for record in data.records:
        image = images.apply_crop(images.read_image(record.path), images.centre_crop(record.resized, record.bucket))
        rng = torch.Generator().manual_seed(0)
        yield record.path, encode(images.to_pixels(image)[None], [rng])[0]


def loop_in_memory(data: TrainingData, encode: Encode) -> None:
    assert len(dict(one_by_one(data, encode))) == len(data.records)


def loop_on_disk(data: TrainingData, encode: Encode) -> None:
    for path, latent in one_by_one(data, encode):
        np.savez(path.with_suffix(".npz"), latents=latent.numpy())


def ours_in_memory(data: TrainingData, encode: Encode) -> None:
    encoder = Encoder(encode, data.opts.data.vae_batch_size, 1, progress=QUIET)
    latents.cache_in_memory(data.records, encoder, LAYOUT)


def ours_on_disk(data: TrainingData, encode: Encode) -> None:
    encoder = Encoder(encode, data.opts.data.vae_batch_size, 1, progress=QUIET)
    latents.cache_on_disk(data.records, data.index, encoder, LAYOUT, "bench")


def remove_caches(folder: Path) -> None:
    for file in folder.rglob("*.npz"):
        file.unlink()


def seconds(work: Callable[[TrainingData, Encode], None], folder: Path, encode: Encode) -> float:
    data = read_data(folder, 256)
    start = time.perf_counter()
    work(data, encode)
    return time.perf_counter() - start


def compare(name: str, folder: Path, count: int, encode: Encode, ours: Callable, loop: Callable, rounds: int) -> None:
    pairs = []
    for _ in range(rounds):
        both = []
        for work in (ours, loop):
            remove_caches(folder)
            both.append(seconds(work, folder, encode))
        pairs.append(both)
    ratio = statistics.median(theirs / own for own, theirs in pairs)
    own, theirs = (count / min(column) for column in zip(*pairs, strict=True))
    print(f"latents {name}: {ratio:.2f} times as fast as the loop; ours {own:.1f}, the loop {theirs:.1f} images/s")


def show_speed(count: int, rounds: int) -> None:
    encode = vae_of_the_model()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "images")
        write_images(folder / "1_x", count, lambda number: SIZES[number % 3])
        for _ in range(3):  # the first runs are slow
            encode(torch.zeros(1, 3, 256, 256), [torch.Generator()])
        compare("in memory", folder, count, encode, ours_in_memory, loop_in_memory, rounds)
        compare("on disk", folder, count, encode, ours_on_disk, loop_on_disk, rounds)
        remove_caches(folder)
        for name in ("first", "second"):
            taken = seconds(ours_on_disk, folder, encode)
            print(f"latents on disk, {name} start: {taken:.2f} s, {count / taken:.0f} images/s")


def pooled(pixels: Tensor, _: object) -> Tensor:
    """Stands in for a VAE: (B, 3, H, W) to (B, 4, H/8, W/8)."""
    small = torch.nn.functional.avg_pool2d(pixels, 8)
    return torch.cat([small, small.mean(1, keepdim=True)], 1)


class Memory:
    """This process's memory at a few points of a long way."""

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.seen: dict[int, float] = {}  # per cent of the way: MiB

    def step(self, count: int) -> None:
        self.done += count
        for share in (10, 50, 100):
            if share not in self.seen and self.done >= self.total * share / 100:
                self.seen[share] = _mib_now()

    def line(self, name: str) -> str:
        growth = 100 * (self.seen[100] / self.seen[10] - 1)
        points = ", ".join(f"{mib:.0f} MiB at {share} %" for share, mib in self.seen.items())
        return f"memory while {name} {self.total} images: {points}; {growth:+.1f} % from 10 % on"


def _mib_now() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def show_memory(count: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "images")
        write_images(folder / "1_x", count, lambda number: (64 + number % 9 * 4, 64))
        caching = Memory(count)

        def encode(pixels: Tensor, rngs: list[torch.Generator]) -> Tensor:
            caching.step(len(pixels))
            return pooled(pixels, rngs)

        data = read_data(folder, 64)
        loading = Memory(count)
        for batch in data.loader(1, workers=0):
            loading.step(len(batch.captions))
        print(loading.line("loading"))
        start = time.perf_counter()
        ours_on_disk(data, encode)
        print(f"{caching.line('caching')}; {count / (time.perf_counter() - start):.0f} images/s")
        reading = Memory(count)
        for batch in data.loader(2, workers=0):
            reading.step(len(batch.captions))
        print(reading.line("reading the latents of"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--many", type=int, default=10_000, help="small images, to watch memory; 0: don't (Linux)")
    args = parser.parse_args()
    if args.many:
        show_memory(args.many)
    show_speed(args.images, args.rounds)


if __name__ == "__main__":
    main()
