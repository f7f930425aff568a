"""Tagging and preparing latents against plain loops that take one image at a time, and memory over many images.

    python benchmarks/bench_preparation.py
    python benchmarks/bench_preparation.py --count 10000

Ours and a plain loop take turns over the same images; the figures that count are the ratios of neighbouring runs.
Photos are JPEG files of 12 megapixels, drawings PNG files of 512 x 512 pixels. The models are small, so that reading
images takes most of the time, as it does beside a GPU: an ONNX tagger of one layer for 448 x 448 pixels, and the
bundled VAE, to sizes at which it takes little (64) and more (256). Ours is all that the scripts do once options are
read; both load their models. --count watches this process's memory while it tags and encodes so many small images
(Linux).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cv2
import numpy as np
import onnxruntime
import torch
from images import write_images
from numpy.typing import NDArray
from PIL import Image

from library.options import parsing
from library.preparation.latents import buckets
from library.preparation.tagging import tag_images as tagging
from library.runtime import logs
from library.runtime.paths import cache_folder

MODEL = ROOT / "examples" / "tiny_model" / "tiny-sd.safetensors"
PHOTO, DRAWING = (4000, 3000), (512, 512)  # pixels
SEEN = 448  # side of what the tagger sees
LABELS = 8
THRESHOLD = 0.35
BATCH = 8  # images that ours gives a model at once


# ---- what is worked on


def write_photos(folder: Path, count: int) -> None:
    """JPEG files with as much detail as photos have, about 1.7 MB each."""
    folder.mkdir()
    for number in range(count):
        Image.fromarray(photo(number)).save(folder / f"{number:03d}.jpg", quality=90)


def photo(seed: int, size: tuple[int, int] = PHOTO) -> NDArray[np.uint8]:
    """Shapes of all sizes, small ones weaker than large ones, and grain; (H, W, 3)."""
    rng, (width, height) = np.random.default_rng(seed), size
    image = rng.normal(size=(height, width, 1)).astype(np.float32) * 1.5 + np.float32(127)
    image = image.repeat(3, axis=-1)
    for columns, strength in ((8, 50), (32, 25), (128, 12), (512, 6)):
        grid = rng.normal(size=(max(2, columns * height // width), columns, 3)) * strength
        image += cv2.resize(grid.astype(np.float32), size, interpolation=cv2.INTER_CUBIC)
    return image.clip(0, 255).astype(np.uint8)


def write_small_tagger(folder: Path) -> None:
    from tests.builders.onnx_file import write_tagger  # once diffusers may be imported quietly

    rng = np.random.default_rng(0)
    weight = rng.normal(scale=3e-5, size=(SEEN * SEEN * 3, LABELS)).astype(np.float32)
    bias = rng.normal(size=LABELS).astype(np.float32)
    write_tagger(folder / "model.onnx", weight, bias, ("N", SEEN, SEEN, 3))
    rows = [f"{number},tag{number},0,1" for number in range(LABELS)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]), encoding="utf-8")


# ---- tagging


def plain_tagging(folder: Path, tagger: Path) -> None:
    """Read, pad, shrink, ask, write."""
    session = onnxruntime.InferenceSession(str(tagger / "model.onnx"))
    name = session.get_inputs()[0].name
    for path in sorted(folder.iterdir()):
        image = np.array(Image.open(path).convert("RGB"))[:, :, ::-1]
        height, width = image.shape[:2]
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        edges = (top, side - height - top, left, side - width - left)
        square = cv2.copyMakeBorder(image, *edges, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        pixels = cv2.resize(square, (SEEN, SEEN), interpolation=cv2.INTER_AREA).astype(np.float32)
        (row,) = session.run(None, {name: pixels[None]})[0]
        tags = [f"tag{number}" for number, probability in enumerate(row) if probability >= THRESHOLD]
        path.with_suffix(".txt").write_text(", ".join(tags) + "\n", encoding="utf-8")


def our_tagging(folder: Path, tagger: Path) -> None:
    arguments = ["--onnx", f"--repo_id={tagger}", f"--batch_size={BATCH}", f"--thresh={THRESHOLD}", str(folder)]
    outcome = tagging.tag_images(parsing.parse_options(tagging.GROUPS, arguments))
    assert not outcome.failed, outcome.lines()


# ---- latents


def plain_latents(folder: Path, side: int) -> None:
    """Read, shrink, cut out, encode, write; into buckets like ours."""
    from library.families.sd.loading import load_vae

    vae, _ = load_vae(str(MODEL))
    for path in sorted(folder.glob("*.*g")):
        image = np.array(Image.open(path).convert("RGB"))
        width, height = bucket_of(image.shape[1], image.shape[0], side)
        scale = max(width / image.shape[1], height / image.shape[0])
        size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
        shrunk = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        top, left = (size[1] - height) // 2, (size[0] - width) // 2
        cut = shrunk[top : top + height, left : left + width]
        pixels = torch.from_numpy(cut).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        np.savez(path.with_suffix(".npz"), latents=latents[0].numpy(), original_size=np.array(image.shape[1::-1]))


def bucket_of(width: int, height: int, side: int) -> tuple[int, int]:
    """Near enough to ours for images of 4:3 and squares: sides in steps of 64, no more pixels than side x side."""
    ratio = width / height
    columns = int(side * ratio**0.5 // 64 * 64)
    return columns, int(side * side // columns // 64 * 64)


def our_latents(folder: Path, side: int) -> None:
    texts = folder.parent / "in.json"
    texts.write_text(json.dumps({path.stem: {"caption": "an image"} for path in folder.iterdir()}), encoding="utf-8")
    places = [str(folder), str(texts), str(folder.parent / "out.json"), str(MODEL)]
    options = [f"--max_resolution={side}", "--min_bucket_reso=64", f"--batch_size={BATCH}"]
    outcome = buckets.prepare(parsing.parse_options(buckets.GROUPS, [*places, *options]))
    assert not outcome.failed, outcome.lines()


# ---- side by side


def compare(name: str, folder: Path, rounds: int, ours: Callable[[], None], loop: Callable[[], None]) -> None:
    images = len(list(folder.iterdir()))
    pairs = []
    for number in range(rounds + 1):
        both = []
        for work, threads in ((loop, os.cpu_count() or 1), (ours, 0)):
            cv2.setNumThreads(threads)  # ours turns OpenCV's threads off for the whole process
            start = time.perf_counter()
            with redirect_stderr(io.StringIO()):  # progress
                work()
            both.append(time.perf_counter() - start)
            for file in folder.iterdir():
                if file.suffix in (".txt", ".npz"):
                    file.unlink()
            shutil.rmtree(cache_folder() / "index", ignore_errors=True)  # what ours knows of the files from before
        if number:  # the first round loads libraries
            pairs.append(both)
    ratios = [plain / own for plain, own in pairs]
    plain, own = (images / statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{name}: ours {own:.1f}, the loop {plain:.1f} images/s; {statistics.median(ratios):.2f} times as fast "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def show_speed(place: Path, photos: int, drawings: int, rounds: int) -> None:
    tagger = place / "tagger"
    tagger.mkdir()
    write_small_tagger(tagger)
    large, small = place / "large" / "photos", place / "small" / "drawings"
    large.parent.mkdir()
    write_photos(large, photos)
    write_images(small, drawings, lambda number: DRAWING, kinds=("png",))
    for file in (*small.glob("*.txt"), small / ".written"):
        file.unlink()
    for folder in (large, small):
        tags = (lambda f=folder: our_tagging(f, tagger)), (lambda f=folder: plain_tagging(f, tagger))
        compare(f"tagging {folder.name}", folder, rounds, *tags)
    for folder, side in ((large, 64), (large, 256), (small, 64)):
        latents = (lambda f=folder, s=side: our_latents(f, s)), (lambda f=folder, s=side: plain_latents(f, s))
        compare(f"latents of {folder.name} at {side} px", folder, rounds, *latents)


# ---- memory


class Watch:
    """Notes this process's memory from a thread, from beginning to end."""

    def __enter__(self) -> Watch:
        self.seen = [resident_mib()]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.05):
            self.seen.append(resident_mib())

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._over.set()
        self._thread.join()

    def line(self) -> str:
        """The most memory in each tenth of the time; the first has the loading in it."""
        tenths = [max(map(float, part)) for part in np.array_split(self.seen, 10)]
        return " ".join(f"{mib:.0f}" for mib in tenths) + f" MiB; {100 * (tenths[-1] / tenths[1] - 1):+.1f} % from 20 %"


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def show_memory(place: Path, count: int) -> None:
    tagger, folder = place / "tagger", place / "many" / "images"
    tagger.mkdir()
    write_small_tagger(tagger)
    write_images(folder, count, lambda number: (64 + number % 9 * 4, 64))
    works = {"tagging": lambda: our_tagging(folder, tagger), "latents": lambda: our_latents(folder, 64)}
    for name, work in works.items():
        with Watch() as memory, redirect_stderr(io.StringIO()):
            work()
        print(f"memory, {name} of {count} images at {count / memory.seconds:.0f}/s: {memory.line()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=16)
    parser.add_argument("--drawings", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=0, help="watch memory over so many small images (Linux)")
    args = parser.parse_args()
    logs.quiet_third_parties()
    logs.setup_logging("ERROR")
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["TRAINSCRIPTS_CACHE"] = temporary
        if args.count:
            show_memory(Path(temporary), args.count)
        else:
            show_speed(Path(temporary), args.photos, args.drawings, args.rounds)


if __name__ == "__main__":
    main()
