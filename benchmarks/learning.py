"""How well each type of network learns a concept: the bundled model, before and after one short training of each.

    python benchmarks/learning.py
    python benchmarks/learning.py --steps 200 --only LoRA LoHa
    python benchmarks/learning.py --only LoKr --learning_rate 8e-3

Each type is trained as quickstart.py trains its LoRA, with the type's own arguments and learning rate; text encoders
have a quarter of the rate. Then images are generated from prompts that name the concept, and from prompts of what the
model knew before, and both are read by plain geometry (examples/tiny_model/images.py). The shares that show what was
asked for are printed. One run of a small model says whether a type learns, and not which type is best.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import quickstart
from examples.tiny_model import measure
from library import cli
from library.methods.network import NetworkMethod
from library.runtime import logs

pic = measure.pic
SAMPLING_STEPS, SCALE = 15, 5.0


@dataclass(frozen=True)
class Row:
    """A type: its module, its arguments, --network_dim, --network_alpha and --learning_rate."""

    module: str
    args: str
    dim: int
    alpha: float
    rate: float


ROWS = {
    "LoRA": Row("lora", "", 16, 16, 4e-3),
    "LoHa": Row("loha", "", 8, 8, 3e-3),
    "LoKr, factor=4": Row("lokr", "factor=4", 16, 16, 1e-2),
    "DoRA, rows": Row("lycoris", "algo=lora preset=attn-mlp dora_wd=True", 16, 16, 4e-3),
    "DoRA, columns": Row("lycoris", "algo=lora preset=attn-mlp dora_wd=True wd_on_output=False", 16, 16, 4e-3),
    "OFT, 4 blocks": Row("oft", "enable_all_linear=True", 4, 1, 1e-3),
    "Diag-OFT": Row("lycoris", "algo=diag-oft preset=attn-mlp", 16, 16, 6e-3),
    "BOFT": Row("lycoris", "algo=boft preset=attn-mlp", 16, 16, 5e-4),
    "OFTv2": Row("oft_v2", "", 16, 1, 3e-3),
    "BOFT of inputs, two stages": Row("boft", "boft_n_butterfly_factor=2", 16, 1, 3e-3),
    "GLoRA": Row("lycoris", "algo=glora preset=attn-mlp", 16, 16, 4e-3),
    "(IA)^3": Row("lycoris", "algo=ia3 preset=attn-mlp", 1, 1, 3e-2),
    "full": Row("lycoris", "algo=full preset=attn-mlp", 1, 1, 1e-3),
}


def prompts(count: int) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """Prompts of the concept; prompts of known scenes, and their color and shape."""
    backgrounds = list(pic.BACKGROUNDS)
    concept = [f"a large sks flower on a {backgrounds[i % len(backgrounds)]} background" for i in range(count)]
    known = [("red", "circle"), ("blue", "star"), ("green", "square"), ("yellow", "heart"), ("cyan", "cross")]
    scenes = [known[i % len(known)] for i in range(count)]
    return concept, [f"a large {color} {shape} on a black background" for color, shape in scenes], scenes


@torch.no_grad()
def shares(module: str, network: Path | None, count: int) -> tuple[float, float]:
    """Of `count` images of the concept, those that show it; of `count` images of known scenes, those that are right."""
    arguments = [f"--pretrained_model_name_or_path={measure.MODEL}", f"--network_module=networks.{module}"]
    if network is not None:
        arguments += [f"--network_weights={network}", "--dim_from_weights"]
    family, models = cli.load_family("sd", arguments)
    if network is not None:
        method = NetworkMethod(family.opts)
        method.attach(family, models)
        method.trainable().eval()
    concept, other, scenes = prompts(count)
    images = measure.sample(family, models, concept + other, 500, SAMPLING_STEPS, SCALE)
    readings = [pic.read(image) for image in images]
    shown = sum(reading.concept for reading in readings[:count])
    right = sum((r.color, r.shape) == scene for r, scene in zip(readings[count:], scenes, strict=True))
    return shown / count, right / count


def train(row: Row, rate: float, steps: int, folder: Path) -> Path:
    """quickstart.py's training with another network. Returns: the network's file."""
    script, *usual = quickstart.training(steps)
    changed = ("--output_dir", "--sample", "--logging", "--log", "--network", "--learning_rate", "--text_encoder_lr")
    arguments = [argument for argument in usual if not argument.startswith(changed)]
    arguments += [f"--network_module=networks.{row.module}", f"--network_dim={row.dim}", f"--network_alpha={row.alpha}"]
    arguments += [f"--learning_rate={rate}", f"--text_encoder_lr={rate / 4}", f"--output_dir={folder}"]
    arguments += ["--max_data_loader_n_workers=0", *(["--network_args", *row.args.split()] if row.args else [])]
    done = subprocess.run([sys.executable, script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return folder / "sks_flower.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="TYPE", help="types to train")
    parser.add_argument("--steps", type=int, default=100, help="of each training (default: 100)")
    parser.add_argument("--images", type=int, default=24, help="of each kind that are read (default: 24)")
    parser.add_argument("--learning_rate", type=float, help="in place of the types' own")
    args = parser.parse_args()
    logs.quiet_third_parties()
    concept, known = shares("lora", None, args.images)
    print(
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {args.steps} steps, {args.images} images of each kind"
    )
    print("\n| type | learning rate | shows the concept | known scenes right | file, MiB |\n|---|---|---|---|---|")
    print(f"| none | | {concept:.0%} | {known:.0%} | |", flush=True)
    for label in args.only:
        row = ROWS[label]
        rate = args.learning_rate or row.rate
        with tempfile.TemporaryDirectory() as folder:
            network = train(row, rate, args.steps, Path(folder))
            concept, known = shares(row.module, network, args.images)
            size = network.stat().st_size / 2**20
        print(f"| {label} | {rate:g} | {concept:.0%} | {known:.0%} | {size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
