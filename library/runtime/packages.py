"""Packages that only some options need: the command that installs what is missing."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
# What is imported -> the file in requirements/ that names its package.
EXTRAS = {
    "apprise": "notify",
    "bitsandbytes": "optimizers",
    "dadaptation": "optimizers",
    "lion_pytorch": "optimizers",
    "prodigyopt": "optimizers",
    "schedulefree": "optimizers",
    "onnxruntime": "tagging",
    "scipy": "core",
    "wandb": "wandb",
}
# What is imported -> the package of a third party, which none of our files names.
THIRD_PARTIES = {"lycoris": "lycoris-lora", "prodigyplus": "prodigy-plus-schedule-free"}


def remedy(module: str) -> str | None:
    """ "run: ...", the command that installs what `module` is imported from; None: not known."""
    if module in EXTRAS:
        return f"run: {pip('install', '-r', _ROOT / 'requirements' / f'{EXTRAS[module]}.txt')}"
    if module in THIRD_PARTIES:
        return f"run: {pip('install', THIRD_PARTIES[module])}"
    return None


def pip(*arguments: str | Path) -> str:
    """A command line for this environment's pip, with paths as short as the current folder allows."""
    words = [_shortened(sys.executable), "-m", "pip", *(_shortened(argument) for argument in arguments)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _shortened(path: str | Path) -> str:
    """Relative to the current folder where it lies below; a command that is no path stays as it is."""
    text = os.fspath(path)
    here = os.getcwd()
    return os.path.relpath(text, here) if os.path.isabs(text) and text.startswith(here + os.sep) else text
