"""What a training step costs beyond the mathematics: ours against a bare diffusers + peft step, in one process.

    python benchmarks/bench_step.py
    python benchmarks/bench_step.py --width 128 --side 32 --batch 2 --steps 8
    python benchmarks/bench_step.py --full

Both train the same LoRA (rank 8 on the U-Net's attention and feed-forward layers) on the bundled model, on the same
latents and text states, alternating, so that a machine's mood falls on both; with `--full` both train the U-Net itself.
The figure that counts is the ratio. With `--width` a larger U-Net of random weights takes the bundled one's place. Peak
memory is that of a fresh process each.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from library import registry
from library.families.base import Family
from library.families.sd.adapter import SdFamily
from library.methods.finetune import FinetuneMethod
from library.methods.network import NetworkMethod
from library.options import parsing
from library.runtime import logs, seeds
from library.training.step import StepParts, training_step
from library.types import Batch, Models, TextCond

MODEL = ROOT / "examples" / "tiny_model" / "tiny-sd.safetensors"
ARGUMENTS = [f"--pretrained_model_name_or_path={MODEL}", "--learning_rate=1e-4", "--seed=1"]
LORA = ["--network_module=networks.lora", "--network_dim=8", "--network_train_unet_only"]


def make_batch(size: int, side: int, device: torch.device) -> Batch:
    """Random latents and text states; their values do not matter to the time."""
    torch.manual_seed(0)
    sizes = torch.full((size, 2), side * 8)
    batch = Batch(
        captions=[""] * size,
        latents=torch.randn(size, 4, side, side),
        pixels=None,
        loss_weights=torch.ones(size),
        masks=None,
        original_sizes=sizes,
        crop_top_lefts=torch.zeros_like(sizes),
        target_sizes=sizes,
        text=TextCond({"context": torch.randn(size, 77, 64)}),
    )
    return batch.to(device)


def load(width: int, full: bool) -> tuple[Family, Models]:
    """The bundled model; with a `width`, its U-Net replaced by a random one with so many channels at the top."""
    logs.quiet_third_parties()
    groups, arguments = ("finetune", ARGUMENTS) if full else ("network", [*ARGUMENTS, *LORA])
    family = SdFamily(parsing.parse_options(registry.groups_for("sd", groups), arguments))
    models = family.loader.load()
    if width:
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        channels = (width, 2 * width, 4 * width, 4 * width)
        models.denoiser = UNet2DConditionModel(block_out_channels=channels, cross_attention_dim=64, layers_per_block=2)
        models.denoiser.requires_grad_(False)
    return family, models


def our_step(batch: Batch, device: torch.device, width: int, full: bool) -> Callable[[], None]:
    family, models = load(width, full)
    method = (FinetuneMethod if full else NetworkMethod)(family.opts)
    method.attach(family, models)
    models.text_encoders.clear()  # their outputs are cached
    models.denoiser.to(device).train()
    method.trainable().to(device).train()
    parts = StepParts(
        family, models, partial(family.denoiser.predict, models), family.denoiser.objective(), grad_text=False
    )
    optimizer = torch.optim.AdamW(method.parameter_groups(), lr=1e-4, fused=True)
    numbers = iter(range(sys.maxsize))

    def step() -> None:
        rng = seeds.generator(device, 1, "noise", next(numbers))
        training_step(parts, batch, rng).losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bare_step(batch: Batch, device: torch.device, width: int, full: bool) -> Callable[[], None]:
    """The shortest correct loop one would write with diffusers and peft."""
    from diffusers import DDPMScheduler
    from peft import LoraConfig

    _, models = load(width, full)
    unet = models.denoiser.to(device).train()
    if full:
        unet.requires_grad_(True)
    else:
        layers = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
        unet.add_adapter(LoraConfig(r=8, lora_alpha=1, target_modules=layers))
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-4, fused=True)
    context = batch.text.tensors["context"]

    def step() -> None:
        noise = torch.randn_like(batch.latents)
        t = torch.randint(0, 1000, (len(noise),), device=device)
        prediction = unet(schedule.add_noise(batch.latents, noise, t), t, context).sample
        torch.nn.functional.mse_loss(prediction, noise).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


STEPS = {"ours": our_step, "bare": bare_step}


def peak_mib(name: str, arguments: list[str]) -> int:
    """Peak memory of a fresh process that does five steps of one kind; Linux and macOS."""
    command = [sys.executable, __file__, *arguments, "--only", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=16, help="latent side; pixels / 8")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each, after 3 that are not timed")
    parser.add_argument("--width", type=int, default=0, help="channels of a random U-Net in place of the bundled one")
    parser.add_argument("--full", action="store_true", help="train the whole U-Net in place of a LoRA")
    parser.add_argument("--only", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = make_batch(args.batch, args.side, device)
    if args.only:
        import resource

        step = STEPS[args.only](batch, device, args.width, args.full)
        for _ in range(5):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    # First, while this process is small: a new process inherits the peak of the one that starts it.
    peaks = {name: peak_mib(name, sys.argv[1:]) for name in STEPS}
    steps = {name: make(batch, device, args.width, args.full) for name, make in STEPS.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(args.steps + 3):
        for name, step in steps.items():
            seconds = timed(step, device)
            if round_number >= 3:
                times[name].append(seconds)
    for name, seconds in times.items():
        spread = f"{min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f}"
        label = name if name == "ours" else "bare diffusers" if args.full else "bare diffusers + peft"
        print(f"{label}: median {statistics.median(seconds) * 1e3:.1f} ms per step ({spread}); peak {peaks[name]} MiB")
    ratio = statistics.median(o / b for o, b in zip(*times.values(), strict=True))
    print(f"ours / bare: {ratio:.3f} (median of paired steps)")


if __name__ == "__main__":
    main()
