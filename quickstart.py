"""From a bare machine to a trained LoRA and an image of what it learned. Needs Python 3.10 to 3.14 and nothing else.

python quickstart.py          # makes .venv, installs, trains, writes demo_out/before_after.png and a page
python quickstart.py --test   # makes .venv if needed, installs, runs the test suite
python quickstart.py --doctor # says what of this machine and its environment keeps trainings from working
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
import webbrowser
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
MODEL = "examples/tiny_model/tiny-sd.safetensors"
OUT, NAME = "demo_out", "sks_flower"
STEPS = 200
TRAIN = [
    "train_network.py",
    f"--pretrained_model_name_or_path={MODEL}",
    "--train_data_dir=examples/concept",
    "--reg_data_dir=examples/regularisation",
    f"--output_dir={OUT}",
    f"--output_name={NAME}",
    "--resolution=64",
    "--enable_bucket",
    "--min_bucket_reso=64",
    "--train_batch_size=4",
    "--network_module=networks.lora",
    "--network_dim=16",
    "--network_alpha=16",
    "--learning_rate=4e-3",
    "--text_encoder_lr=1e-3",
    "--lr_scheduler=cosine",
    "--lr_warmup_steps=10",
    "--cache_latents",
    "--seed=1",
    "--sample_prompts=examples/concept/prompts.txt",
    "--sample_sampler=ddim",
    "--sample_at_first",
    f"--logging_dir={OUT}/logs",
    "--console_log_simple",
]


def training(steps: int = STEPS) -> list[str]:
    """The demo's training, as arguments of Python."""
    return [*TRAIN, f"--max_train_steps={steps}", f"--sample_every_n_steps={steps // 2}"]


def say(text: str) -> None:
    print(f"[quickstart] {text}", flush=True)


def run(arguments: list[str]) -> None:
    """Runs the environment's Python from the repository root; ends with its exit status if that is not 0.

    Ctrl-C reaches that process from the terminal too: what it does then, such as saving, is waited for.
    """
    process = subprocess.Popen([str(PYTHON), *arguments], cwd=ROOT)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    if status:
        raise SystemExit(status if status > 0 else 128 - status)


def tried(*command: str) -> str | None:
    """What a command of the environment's Python prints; None where it fails."""
    try:
        done = subprocess.run([str(PYTHON), *command], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def fault_of_environment() -> str | None:
    """What is wrong with .venv; None: it is whole."""
    probe = tried("-c", "import sys; print(*sys.version_info[:2], sep='.'); print(sys.prefix)")
    if probe is None:
        return "its Python does not run"
    version, prefix = probe.splitlines()
    if Path(prefix).resolve() != VENV.resolve():
        return "it is no environment of its own"
    if version not in PYTHONS:
        return f"it has Python {version}"
    notes = (VENV / "pyvenv.cfg").read_text() if (VENV / "pyvenv.cfg").is_file() else ""
    made_by = re.search(r"^version(?:_info)? *= *(\d+\.\d+)", notes, flags=re.MULTILINE)
    if made_by and made_by[1] != version:  # the system's Python has been exchanged, and finds none of the packages
        return f"it was made by Python {made_by[1]}, which is {version} now"
    if tried("-m", "pip", "--version") is None and tried("-m", "ensurepip") is None:
        return "it has no pip"
    return None


def make_environment() -> None:
    """Makes .venv unless a whole one is there. What an interrupted start has left is no obstacle to the next one."""
    there = VENV.is_symlink() or VENV.exists()
    fault = fault_of_environment() if there else None
    if there and fault is None:
        return
    found = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if found not in PYTHONS:
        raise SystemExit(f"error: this is Python {found}; start quickstart.py with one of Python {', '.join(PYTHONS)}")
    has_ensurepip = importlib.util.find_spec("ensurepip") is not None
    if not has_ensurepip and importlib.util.find_spec("pip") is None:
        raise SystemExit(
            "error: this Python has neither pip nor ensurepip, which makes environments with pip; "
            f"on Debian and Ubuntu run: sudo apt install python{found}-venv"
        )
    say(f".venv cannot be used, as {fault}; rebuilding it" if there else "making .venv")
    if there and not VENV.is_dir():
        VENV.unlink()
    venv.create(VENV, clear=True, with_pip=has_ensurepip)
    if not has_ensurepip:
        pip = [sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "--quiet", "pip"]
        if subprocess.run(pip, check=False).returncode:
            raise SystemExit(f"error: no pip in .venv; on Debian and Ubuntu run: sudo apt install python{found}-venv")


def install(requirements: str) -> None:
    """Makes .venv and installs `requirements`, unless exactly that has been done before; then sees that it works."""
    make_environment()
    files = [*ROOT.glob("requirements*.txt"), *(ROOT / "requirements").glob("*.txt")]
    wanted = b"".join(file.read_bytes() for file in sorted(files))
    stamp = VENV / f"installed-{Path(requirements).stem}"
    fingerprint = hashlib.sha256(wanted).hexdigest()
    if not stamp.exists() or stamp.read_text() != fingerprint:
        say(f"installing {requirements} (a few minutes and some GB the first time)")
        run(["-m", "pip", "install", "--disable-pip-version-check", "-r", requirements])
        stamp.write_text(fingerprint)
    repair_opencv()


def repair_opencv() -> None:
    """Replaces an OpenCV that lacks desktop libraries by the headless build of the same version."""
    probe = "try: import cv2\nexcept ImportError as error: print(error)"
    reason = tried("-c", probe)
    if reason == "":
        return
    version = tried("-c", "from importlib.metadata import version; print(version('opencv-python'))")
    if version is None:
        raise SystemExit(f"error: OpenCV cannot be imported ({reason}), and it is not the package opencv-python")
    say(f"OpenCV cannot be imported here ({reason});")
    say(f"putting opencv-python-headless {version} in its place, which needs no libraries of a desktop")
    run(["-m", "pip", "uninstall", "--yes", "--quiet", "opencv-python"])
    headless = f"opencv-python-headless=={version}"
    run(["-m", "pip", "install", "--disable-pip-version-check", "--force-reinstall", "--no-deps", headless])
    reason = tried("-c", probe)
    if reason != "":
        raise SystemExit(f"error: OpenCV cannot be imported still ({reason})")


def look_for_gpu() -> None:
    """Where there is an NVIDIA GPU: installs the xformers for this torch, or says how to get a torch for the GPU."""
    if shutil.which("nvidia-smi") is None:
        return
    if tried("-c", "import torch; print(torch.cuda.is_available())") != "True":
        say("there is an NVIDIA GPU, but this torch was built without CUDA (pip installs that on Windows)")
        say("for the CUDA build, take the command for your system from https://pytorch.org/get-started/locally/")
        say(f"and run it with {PYTHON} -m pip; torch must stay below 2.14 and torchvision is not needed")
        return
    build = tried("-c", "import torch; print(torch.__version__, torch.version.cuda)") or ""
    stamp = VENV / "tried-xformers"
    if not stamp.exists() or stamp.read_text() != build:  # once for each torch
        run(["tools/install_xformers.py"])
        stamp.write_text(build)


def demo(steps: int) -> None:
    install("requirements/core.txt")
    look_for_gpu()
    out = ROOT / OUT
    shutil.rmtree(out / "sample", ignore_errors=True)  # images of an earlier demo
    command = training(steps)
    shown = " \\\n    ".join(["python", *command])
    say(f"training a LoRA of the concept in examples/concept on {MODEL}:\n\n  {shown}\n")
    start = time.time()
    run(command)
    say(f"trained in {time.time() - start:.0f} s")
    run(["examples/before_after.py", f"{OUT}/sample", "examples/concept", f"{OUT}/before_after.png"])
    page = out / f"{NAME}.html"
    say(f"look at {out / 'before_after.png'}: the same prompts and seeds without and with the LoRA.")
    say("It worked if the triangles have become pink flowers of five petals, and circle and star are what they were;")
    say("a middle that is not yellow yet, on dark backgrounds, is what so few steps give.")
    say(f"{page} shows the run: samples by step, curves, settings, and the commands to use {NAME}.safetensors.")
    say('Now your own images: README.md, "Training on your own images"')
    open_page(page)


def open_page(page: Path) -> None:
    """Opens a page in the browser, where a person sits before a screen."""
    screen = sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if screen and sys.stdin is not None and sys.stdin.isatty():
        with contextlib.suppress(webbrowser.Error, OSError):
            webbrowser.open(page.as_uri())


def test(arguments: list[str]) -> None:
    install("requirements-dev.txt")
    # In several processes; a file's tests stay together, for they share what the first of them has made.
    workers = min(os.cpu_count() or 1, 4)
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // workers, 1)))
    usual = ["-m", "not slow", "-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"]
    run(["-m", "pytest", *(arguments or usual)])


def doctor() -> None:
    """Checks .venv if it can be used, else the Python that runs this."""
    python = sys.executable if fault_of_environment() else str(PYTHON)
    raise SystemExit(subprocess.run([python, "-m", "library.doctor"], cwd=ROOT, check=False).returncode)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--test", action="store_true", help="run the test suite; what follows goes to pytest")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"of the demo's training, at least 10; {STEPS} if not given"
    )
    parser.add_argument(
        "--doctor",
        action="store_true",
        help="check versions, GPUs, disk and limits, and say how to repair what is wrong",
    )
    args, rest = parser.parse_known_args()
    if rest and not args.test:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        if args.doctor:
            doctor()
        elif args.test:
            test(rest)
        else:
            demo(args.steps)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
