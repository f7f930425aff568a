"""Whether a change has broken something obvious: the code's structure, the options, and one training step. Seconds.

    python tools/smoke.py

Takes under ten seconds on two free cores; the whole suite is `python quickstart.py --test`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/test_structure.py", "tests/options/test_flags.py", "tests/options/test_parsing.py")
TRAINING = (
    "train_network.py",
    "--pretrained_model_name_or_path=examples/tiny_model/tiny-sd.safetensors",
    "--train_data_dir=examples/concept",
    "--output_name=smoke",
    "--resolution=64",
    "--enable_bucket",
    "--min_bucket_reso=64",
    "--network_module=networks.lora",
    "--learning_rate=1e-4",
    "--max_train_steps=1",
    "--max_data_loader_n_workers=0",
    "--no_results_page",
    "--seed=1",
)


def jobs(out: Path) -> dict[str, list[str]]:
    """The commands, by what they try. Args: out: a folder for what the training step writes."""
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return {
        "structure and options": [sys.executable, *pytest, *TESTS],
        "one training step": [sys.executable, *TRAINING, f"--output_dir={out}"],
    }


def run(commands: Mapping[str, Sequence[str]]) -> int:
    """Runs all at once; prints how long each took, and what those say that fail. Returns the exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    how = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    begun, status = time.time(), 0
    with ThreadPoolExecutor(len(commands)) as pool:
        tried = {pool.submit(subprocess.run, command, **how): name for name, command in commands.items()}
        for done in as_completed(tried):
            process = done.result()
            print(f"{time.time() - begun:5.1f} s  {tried[done]}: {'failed' if process.returncode else 'ok'}")
            if process.returncode:
                print(process.stdout.decode(errors="replace"))
                status = 1
    return status


def main() -> int:
    with tempfile.TemporaryDirectory() as out:
        status = run(jobs(Path(out)))
        if status == 0 and not (Path(out) / "smoke.safetensors").is_file():
            print("the training step has saved nothing")
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
