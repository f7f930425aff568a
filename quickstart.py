"""From a bare machine to a trained LoRA and a picture of what it learned. Needs Python 3.10 to 3.13 and nothing else.

python quickstart.py          # makes .venv, installs, trains, writes demo_out/before_after.png
python quickstart.py --test   # makes .venv if needed, installs, runs the test suite
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
MODEL = "examples/tiny_model/tiny-sd.safetensors"
OUT = "demo_out"
STEPS = 500
TRAIN = [
    "train_network.py",
    f"--pretrained_model_name_or_path={MODEL}",
    "--train_data_dir=examples/concept",
    "--reg_data_dir=examples/regularisation",
    f"--output_dir={OUT}",
    "--output_name=sks_flower",
    "--resolution=64",
    "--enable_bucket",
    "--min_bucket_reso=64",
    "--train_batch_size=4",
    f"--max_train_steps={STEPS}",
    "--network_module=networks.lora",
    "--network_dim=16",
    "--network_alpha=16",
    "--learning_rate=2e-3",
    "--text_encoder_lr=1e-3",
    "--lr_scheduler=cosine",
    "--lr_warmup_steps=10",
    "--cache_latents",
    "--seed=1",
    "--sample_prompts=examples/concept/prompts.txt",
    "--sample_sampler=ddim",
    "--sample_at_first",
    f"--sample_every_n_steps={STEPS}",
    f"--logging_dir={OUT}/logs",
    "--console_log_simple",
]


def say(text: str) -> None:
    print(f"[quickstart] {text}", flush=True)


def run(arguments: list[str]) -> None:
    """Runs the environment's Python from the repository root; ends with its exit status if that is not 0."""
    status = subprocess.run([str(PYTHON), *arguments], cwd=ROOT, check=False).returncode
    if status:
        raise SystemExit(status)


def install(requirements: str) -> None:
    """Makes .venv and installs `requirements`, unless exactly that has been done before."""
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        found = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise SystemExit(f"error: this is Python {found}; start quickstart.py with Python 3.10, 3.11, 3.12 or 3.13")
    wanted = b"".join((ROOT / name).read_bytes() for name in sorted({"requirements.txt", requirements}))
    stamp = VENV / f"installed-{requirements}"
    fingerprint = hashlib.sha256(wanted + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == fingerprint and PYTHON.exists():
        return
    if not PYTHON.exists():
        say("making .venv")
        venv.create(VENV, with_pip=True)
    say(f"installing {requirements} (a few minutes and some GB the first time)")
    run(["-m", "pip", "install", "--disable-pip-version-check", "--quiet", "-r", requirements])
    stamp.write_text(fingerprint)


def report_gpu() -> None:
    """Where there is an NVIDIA GPU that the installed torch can't use, says how to change that."""
    if shutil.which("nvidia-smi") is None:
        return
    probe = [str(PYTHON), "-c", "import torch; print(torch.cuda.is_available())"]
    if subprocess.run(probe, capture_output=True, text=True, check=False).stdout.strip() != "True":
        say("there is an NVIDIA GPU, but this torch was built without CUDA (pip installs that on Windows)")
        say("for the CUDA build, take the command for your system from https://pytorch.org/get-started/locally/")
        say(f"and run it with {PYTHON} -m pip; torch must stay below 2.14 and torchvision is not needed")


def demo() -> None:
    install("requirements.txt")
    report_gpu()
    out = ROOT / OUT
    shutil.rmtree(out / "sample", ignore_errors=True)  # pictures of an earlier demo
    shown = " \\\n    ".join(["python", *TRAIN])
    say(f"training a LoRA of the concept in examples/concept on {MODEL}:\n\n  {shown}\n")
    start = time.time()
    run(TRAIN)
    say(f"trained in {time.time() - start:.0f} s")
    run(["examples/before_after.py", f"{OUT}/sample", "examples/concept", f"{OUT}/before_after.png"])
    say(f"look at {out / 'before_after.png'}: the same prompts and seeds without and with the LoRA")


def test(arguments: list[str]) -> None:
    install("requirements-dev.txt")
    # All of it in several processes; a file's tests stay together, for they share what the first of them has made.
    workers = min(os.cpu_count() or 1, 4)
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // workers, 1)))
    run(["-m", "pytest", *(arguments or ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", action="store_true", help="run the test suite; what follows goes to pytest")
    args, rest = parser.parse_known_args()
    if rest and not args.test:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if args.test:
        test(rest)
    else:
        demo()


if __name__ == "__main__":
    main()
