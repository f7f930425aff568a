"""Memory of a training run over many steps: it must stay where it is. Linux.

python benchmarks/bench_memory.py
python benchmarks/bench_memory.py --steps 200
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def resident_mib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 >> 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        command = [
            "train_network.py",
            "--pretrained_model_name_or_path=examples/tiny_model/tiny-sd.safetensors",
            "--train_data_dir=examples/concept",
            *("--resolution=64", "--enable_bucket", "--min_bucket_reso=64", "--cache_latents", "--flip_aug"),
            *(f"--output_dir={out}", f"--logging_dir={out}/logs", "--shuffle_caption", "--ema", "--seed=1"),
            *("--network_module=networks.lora", "--network_dim=4", "--max_data_loader_n_workers=0"),
            f"--max_train_steps={args.steps}",
        ]
        run = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        seen: dict[int, int] = {}  # step: MiB
        text = ""
        while piece := run.stderr.read(64):
            text = (text + piece)[-400:]
            counts = [part.rpartition(" ")[2] for part in text.split(f"/{args.steps} [")[:-1]]
            if counts and counts[-1].isdecimal():
                resident = resident_mib(run.pid)
                if resident:  # 0 once it has ended
                    seen[int(counts[-1])] = resident
            time.sleep(0)
        if run.wait():
            raise SystemExit(text)
    points = [min(seen, key=lambda step: abs(step - share * args.steps / 100)) for share in (10, 25, 50, 75, 100)]
    for step in points:
        print(f"step {step}: {seen[step]} MiB")
    print(f"from step {points[0]} on: {seen[points[-1]] / seen[points[0]] - 1:+.1%}")


if __name__ == "__main__":
    main()
