"""Whether validation on a few images finds the best moment of a run that trains too long.

    python benchmarks/bench_validation.py
    python benchmarks/bench_validation.py --held_out 4 --seeds 1 2 3

The bundled model trains a LoRA on eight drawn flowers, far longer than is good. Each run is done twice: with
--early_stop_patience and --save_best_validation, and to its end, with a copy at every validation. The truth is the loss
of these copies on many fresh images of the same kind, at many timesteps, with noise of its own and diffusers' schedule.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image

from examples.tiny_model import images, measure
from library import cli
from library.data.sample.images import to_pixels
from library.methods.network import NetworkMethod
from library.runtime import logs

TRAINED = 8
BATCH = 64  # points at once


@dataclass(frozen=True)
class Truth:
    """Fresh images with fixed noise: latents (N, C, h, w), captions, timesteps (N,), noise like the latents."""

    latents: torch.Tensor
    captions: list[str]
    timesteps: torch.Tensor
    noise: torch.Tensor


def drawn(folder: Path, count: int, seed: int) -> Path:
    """A folder for --train_data_dir with `count` flowers, each once."""
    images.write_concept(folder, count, seed)
    (place,) = folder.iterdir()
    place.rename(folder / f"1_{place.name.partition('_')[2]}")
    return folder


@torch.no_grad()
def truth_of(folder: Path, points: int) -> Truth:
    """Each image of a folder at `points` timesteps."""
    family, models = measure.load(measure.MODEL)
    files = sorted(folder.glob("*/*.png"))
    pixels = []
    for file in files:
        with Image.open(file) as opened:
            small = opened.convert("RGB").resize((images.SIZE, images.SIZE), Image.Resampling.BOX)
        pixels.append(to_pixels(np.asarray(small)))
    latents = family.latents.encode(models, torch.stack(pixels), generator=torch.Generator().manual_seed(1))
    latents = family.latents.scale(latents).repeat_interleave(points, 0)
    captions = [file.with_suffix(".caption").read_text(encoding="utf-8").strip() for file in files]
    times = ((torch.arange(points) + 0.5) * 1000 / points).long().repeat(len(files))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    return Truth(latents, [caption for caption in captions for _ in range(points)], times, noise)


@torch.no_grad()
def true_loss(truth: Truth, network: Path | None) -> torch.Tensor:
    """The squared error of the predicted noise, (N,), of the model with a network."""
    line = [f"--pretrained_model_name_or_path={measure.MODEL}", "--network_module=networks.lora"]
    line += ["--network_train_unet_only", *([f"--network_weights={network}", "--dim_from_weights"] if network else [])]
    family, models = cli.load_family("sd", line)
    if network is not None:
        method = NetworkMethod(family.opts)
        method.attach(family, models)
        method.trainable().eval()
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    noisy = schedule.add_noise(truth.latents, truth.noise, truth.timesteps)
    words = list(dict.fromkeys(truth.captions))
    states = family.text.encode(models, words)
    numbers = torch.tensor([words.index(caption) for caption in truth.captions])
    found = []
    for first in range(0, len(noisy), BATCH):
        part = slice(first, first + BATCH)
        cond = states.map(lambda tensor, part=part: tensor[numbers[part]])
        predicted = family.denoiser.predict(models, noisy[part], truth.timesteps[part], cond)
        found.append((predicted - truth.noise[part]).square().flatten(1).mean(1))
    return torch.cat(found)


def train(data: Path, out: Path, seed: int, args: argparse.Namespace, *more: str) -> str:
    """A run of train_network.py. Returns what it says."""
    split = args.held_out / (TRAINED + args.held_out)
    command = [sys.executable, "train_network.py", f"--pretrained_model_name_or_path={measure.MODEL}"]
    command += [f"--train_data_dir={data}", f"--output_dir={out}", "--output_name=flower", f"--seed={seed}"]
    command += ["--resolution=64", "--enable_bucket", "--min_bucket_reso=64", "--train_batch_size=8", "--cache_latents"]
    command += ["--ema", "--ema_decay=0.95"]
    command += ["--network_module=networks.lora", "--network_dim=16", "--network_alpha=16", "--network_train_unet_only"]
    command += [f"--learning_rate={args.rate}", f"--max_train_steps={args.steps}", "--no_results_page"]
    command += [f"--validation_split={split}", f"--validate_every_n_steps={args.every}", *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stderr


def run(seed: int, args: argparse.Namespace, folder: Path) -> None:
    """Trains with one seed, twice, and prints a row of the table."""
    data = drawn(folder / "data", TRAINED + args.held_out, 100 + seed)
    truth = truth_of(drawn(folder / "fresh", args.fresh, 200 + seed), args.points)
    stopping = ["--save_best_validation", f"--early_stop_patience={args.patience}"]
    said = train(data, folder / "stopped", seed, args, *stopping)
    seen = {int(step): float(loss) for loss, step in re.findall(r"validation loss ([\d.]+) at step (\d+)", said)}
    errors = [float(error) for error in re.findall(r"from the base.*standard error ([\d.]+) %", said)]
    after = sorted(errors[1:])  # the first one is that of the large change from the base
    train(data, folder / "whole", seed, args, f"--save_every_n_steps={args.every}")
    curve = {0: true_loss(truth, None)}
    for step in range(args.every, args.steps, args.every):
        curve[step] = true_loss(truth, folder / "whole" / f"flower-step{step:08d}.safetensors")
    means = {step: float(losses.mean()) for step, losses in curve.items()}
    optimum = min(means, key=means.get)
    last, best = max(seen), min(seen, key=seen.get)
    chosen = float(true_loss(truth, folder / "stopped" / "flower-best.safetensors").mean())
    if args.curve:
        for step, mean in means.items():
            print(f"    step {step:4}: true {mean:.5f}, validation {seen.get(step, float('nan')):.5f}", flush=True)
    print(
        f"| {seed} | {args.held_out} | {means[0]:.4f} | {optimum} | {means[optimum]:.4f} | {max(means)} | "
        f"{means[max(means)]:.4f} | {best} | {chosen:.4f} | {100 * (chosen / means[optimum] - 1):+.2f} % | "
        f"{100 * (best / optimum - 1):+.0f} % | {last} | "
        f"{after[len(after) // 2]:.2f}, {after[-1]:.2f} % |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--held_out", type=int, default=4, help="images, beside the eight (default: 4)")
    parser.add_argument("--steps", type=int, default=300, help="of the run that is too long (default: 300)")
    parser.add_argument("--every", type=int, default=20, help="steps between validations (default: 20)")
    parser.add_argument("--patience", type=int, default=5)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--fresh", type=int, default=24, help="images of the truth (default: 24)")
    parser.add_argument("--points", type=int, default=8, help="timesteps of each (default: 8)")
    parser.add_argument("--curve", action="store_true", help="print every step, too")
    args = parser.parse_args()
    logs.quiet_third_parties()
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, LoRA of rank 16, rate {args.rate:g}, batch 8")
    heads = ("seed", "held out", "true loss at the start", "true optimum", "its loss", "end", "its loss")
    heads += ("best copy, step", "its true loss", "over the optimum's", "step off by", "stopped at")
    heads += ("standard error of differences from the best: median, largest",)
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            run(seed, args, Path(folder))


if __name__ == "__main__":
    main()
