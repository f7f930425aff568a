"""Ctrl-C ends every script with one line and status 130."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_WORK_TO_INTERRUPT = {  # for those who work on the code, or started once: Python's own answer, which is 130 too
    *("quickstart.py", "setup.py", "tools/mutation.py", "tools/option_tables.py", "tools/promises.py"),
    *("tools/timestep_figures.py", "tools/install_xformers.py", "tools/smoke.py"),
}
SCRIPTS = sorted(
    file.relative_to(ROOT).as_posix()
    for pattern in ("*.py", "finetune/*.py", "tools/*.py", "networks/*.py")
    for file in ROOT.glob(pattern)
    if "__main__" in file.read_text(encoding="utf-8") and file.relative_to(ROOT).as_posix() not in NO_WORK_TO_INTERRUPT
)
INTERRUPTED = """
import contextlib, io, json, runpy, sys
from library.options import parsing
def interrupted(*args, **options):
    raise KeyboardInterrupt
parsing.parse_options = interrupted
found = {}
for script in sys.argv[1:]:
    sys.argv[:] = [script]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        status = repr(error)
    found[script] = [status, said.getvalue()]
print(json.dumps(found))
"""


def test_every_script_ends_in_one_line_with_130(run_script):
    assert len(SCRIPTS) > 50
    done = run_script("-c", INTERRUPTED, *SCRIPTS)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    line = re.compile(r"interrupted; what was (saved|written) before is whole(, and --skip_existing .*)?\n")
    wrong = {
        script: end for script, end in found.items() if end[0] != 130 or not line.fullmatch(end[1].splitlines(True)[-1])
    }
    assert found.keys() == set(SCRIPTS)
    assert not wrong


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_drawing_is_interrupted(start_script, small_model, tmp_path):
    script = start_script(
        *("gen_img.py", f"--ckpt={small_model}", "--prompt=a cat", "--W=64", "--H=64", "--steps=20"),
        *("--images_per_prompt=500", f"--outdir={tmp_path}", "--seed=1"),
    )
    while not list(tmp_path.glob("*.png")) and script.is_running():
        time.sleep(0.02)
    os.kill(script.pid, signal.SIGINT)
    done = script.result()
    assert done.returncode == 130, done.stderr[-3000:]
    assert done.stderr.rstrip().endswith("interrupted; what was written before is whole")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_the_quickstart_waits_for_what_the_training_saves():
    """The terminal sends Ctrl-C to both, and the training has something to do still."""
    child = """
import signal, sys, time
def end(*_):
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, end)
print("ready", flush=True)
time.sleep(60)
"""
    parent = "import sys, quickstart; quickstart.PYTHON = sys.executable; quickstart.run(['-c', sys.argv[1]])"
    started = subprocess.Popen(
        [sys.executable, "-c", parent, child], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert started.stdout.readline() == "ready\n"
    os.killpg(started.pid, signal.SIGINT)
    output, errors = started.communicate(timeout=60)
    assert (started.returncode, output, errors) == (130, "saved\n", "")
