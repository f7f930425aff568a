"""Whether two states of the code learn alike: the losses of short trainings of the bundled model, step by step.

    git worktree add /tmp/before COMMIT
    python benchmarks/loss_curves.py --against /tmp/before

For each precision it trains with two seeds in both checkouts, and prints how far the losses of a step are apart: from
checkout to checkout with the same seed, and from seed to seed, which is the noise to hold a difference against.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (1, 2)
TAG = "loss/current"


def losses(checkout: Path, precision: str, seed: int, steps: int) -> list[float]:
    """The loss of each step of a LoRA training by the code of a checkout."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as folder:
        options = {
            "pretrained_model_name_or_path": ROOT / "examples/tiny_model/tiny-sd.safetensors",
            "train_data_dir": ROOT / "examples/concept",
            "output_dir": folder,
            "logging_dir": f"{folder}/logs",
            "log_with": "tensorboard",
            "network_module": "networks.lora",
            "resolution": 64,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "max_train_steps": steps,
            "max_data_loader_n_workers": 0,
            "mixed_precision": precision,
            "seed": seed,
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        line = [sys.executable, "train_network.py", *words, "--cache_latents"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run(line, cwd=checkout, check=True, capture_output=True, env=environment)
        (events,) = Path(folder, "logs").rglob("events.out.*")
        log = EventAccumulator(str(events.parent)).Reload()
        return [event.value for event in log.Scalars(TAG)]


def apart(left: list[float], right: list[float]) -> tuple[float, float]:
    """The mean distance of the losses of a step over the mean loss, and that of the mean losses."""
    mean = fmean(left + right) or 1.0
    return fmean(abs(a - b) for a, b in zip(left, right, strict=True)) / mean, abs(fmean(left) - fmean(right)) / mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, required=True, help="the other checkout")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    print("| precision | between | losses of a step apart | mean losses apart |\n|---|---|---|---|")
    for precision in ("no", "bf16"):
        seen = {
            (name, seed): losses(checkout, precision, seed, args.steps)
            for seed in SEEDS
            for name, checkout in (("before", args.against), ("now", ROOT))
        }
        pairs = {f"before and now, seed {seed}": (("before", seed), ("now", seed)) for seed in SEEDS}
        pairs["both seeds, now"] = tuple(("now", seed) for seed in SEEDS)
        for words, (left, right) in pairs.items():
            step, mean = apart(seen[left], seen[right])
            print(f"| {precision} | {words} | {step:.2e} | {mean:.2e} |", flush=True)


if __name__ == "__main__":
    main()
