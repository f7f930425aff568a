"""quickstart.py --doctor names what is wrong with a machine, and how to repair it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from library import doctor

ROOT = Path(__file__).resolve().parent.parent


def run(*python: str, **environment: str) -> subprocess.CompletedProcess:
    command = [*(python or [sys.executable]), "-m", "library.doctor"]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_faults_are_named_with_their_remedy_and_the_status_is_1(tmp_path):
    """A real run: a GPU's tool without a torch for it, and a hub cache that is a file."""
    fake, file = tmp_path / "bin", tmp_path / "file"
    fake.mkdir()
    (fake / "nvidia-smi").write_text("#!/bin/sh\n")
    (fake / "nvidia-smi").chmod(0o755)
    file.write_text("")
    done = run(PATH=f"{fake}:{os.environ['PATH']}", HF_HUB_CACHE=str(file), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == ""
    assert "there is an NVIDIA GPU, but " in done.stdout
    assert f"fault  {file}: models of the hub cannot be kept there" in done.stdout
    assert "-> set HF_HOME to a folder of yours" in done.stdout
    assert "2 faults found" in done.stdout


def test_it_runs_where_nothing_is_installed():
    done = run(
        sys.executable, "-S", "-I", "-c", "import sys; sys.path.insert(0, '.'); from library.doctor import main; main()"
    )
    assert "packages of requirements/core.txt are missing" in done.stdout
    assert "pip install -r requirements/core.txt" in done.stdout
    assert done.stderr == ""


def test_versions_are_compared_with_the_ranges(tmp_path, monkeypatch):
    (tmp_path / "requirements").mkdir()
    for name in doctor.REQUIREMENTS:
        (tmp_path / "requirements" / f"{name}.txt").write_text("# nothing\n")
    (tmp_path / "requirements" / "core.txt").write_text("numpy>=99\n")
    (tmp_path / "requirements" / "wandb.txt").write_text('no-such-package>=1\nabsent; sys_platform == "none"\n')
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    found = {finding.state: finding for finding in doctor.packages() if finding.state != "ok"}
    assert "numpy " in found["fault"].text
    assert " is not >=99" in found["fault"].text
    assert found["note"].text == "requirements/wandb.txt: no-such-package is missing; needed for --log_with wandb"


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_few_open_files_are_a_fault():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
        "from library.doctor import limits\nprint(*limits(), sep='\\n')"
    )
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert "only 200 files may be open at once" in said
    assert "ulimit -n 65536" in said
