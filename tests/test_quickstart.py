"""The first command on a bare machine, and environments that earlier starts have left half made."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import quickstart

ROOT = Path(__file__).resolve().parent.parent


# --- .venv ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(monkeypatch, tmp_path) -> Path:
    """Where quickstart.py looks for .venv."""
    folder = tmp_path / ".venv"
    monkeypatch.setattr(quickstart, "PYTHON", folder / quickstart.PYTHON.relative_to(quickstart.VENV))
    monkeypatch.setattr(quickstart, "VENV", folder)
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    return folder


def _nothing(place: Path) -> None: ...


def _empty_folder(place: Path) -> None:
    place.mkdir()


def _file(place: Path) -> None:
    place.write_text("no folder")


def _interrupted(place: Path) -> None:
    """No Python yet."""
    venv.create(place, with_pip=False)
    quickstart.PYTHON.unlink()


def _python_gone(place: Path) -> None:
    venv.create(place, with_pip=False)
    quickstart.PYTHON.unlink()
    quickstart.PYTHON.symlink_to("/no/such/python3")


def _made_by_another_python(place: Path) -> None:
    """The system's Python has been exchanged: the same link is another version now."""
    venv.create(place, with_pip=False)
    notes = place / "pyvenv.cfg"
    notes.write_text(re.sub(r"(?m)^version = .*$", "version = 3.9.2", notes.read_text()))


def _link_to_the_system(place: Path) -> None:
    """What runs is not an environment: pip would install into the system."""
    quickstart.PYTHON.parent.mkdir(parents=True)
    quickstart.PYTHON.symlink_to(sys._base_executable)


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
@pytest.mark.parametrize(
    "leave",
    [_nothing, _empty_folder, _file, _interrupted, _python_gone, _made_by_another_python, _link_to_the_system],
)
def test_an_environment_that_cannot_be_used_is_made_again(place, monkeypatch, capsys, leave):
    leave(place)
    create = venv.create  # without pip, whose installation takes seconds and is tried below
    monkeypatch.setattr(quickstart.venv, "create", lambda folder, clear, with_pip: create(folder, clear=clear))
    quickstart.make_environment()
    assert quickstart.tried("-c", "import sys; print(sys.prefix)") == str(place)
    said = capsys.readouterr().out
    assert ("rebuilding it" in said) == (leave is not _nothing)


@pytest.mark.slow
def test_an_environment_without_pip_is_given_it_and_kept(place):
    """What Debian's Python leaves where python3-venv is missing, and what some other tools make."""
    venv.create(place, with_pip=False)
    (place / "of-the-user").write_text("stays")
    quickstart.make_environment()
    assert quickstart.tried("-m", "pip", "--version")
    assert (place / "of-the-user").exists()


def test_a_whole_environment_stays(place, monkeypatch):
    venv.create(place, with_pip=False)
    real = quickstart.tried
    monkeypatch.setattr(quickstart, "tried", lambda *words: "pip" if words[0] == "-m" else real(*words))
    monkeypatch.setattr(quickstart.venv, "create", lambda *_, **__: pytest.fail("was made anew"))
    quickstart.make_environment()


def test_a_python_that_can_make_no_environment(place, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"sudo apt install python3\.\d+-venv"):
        quickstart.make_environment()
    assert not place.exists()


def test_a_python_that_is_too_old(place, monkeypatch):
    monkeypatch.setattr(quickstart, "PYTHONS", ("3.99",))
    with pytest.raises(SystemExit, match=r"start quickstart\.py with one of Python 3\.99"):
        quickstart.make_environment()


# --- all of it --------------------------------------------------------------------------------------------------------

BARE = r"""
set -e
for folder in $HIDDEN_FROM; do
    mkdir -p "$WORK/up$folder" "$WORK/work$folder"
    mount -t overlay overlay -o "lowerdir=$folder,upperdir=$WORK/up$folder,workdir=$WORK/work$folder" "$folder"
done
find $HIDDEN_FROM -name 'libGL.so*' -delete
rm -rf $HIDDEN
cd "$CHECKOUT"
exec "$PYTHON" quickstart.py --steps 10
"""


def can_unshare() -> bool:
    """Whether a view of one's own of the file system, with layers over it, and of the network can be had."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    trial = "cd $(mktemp -d) && mkdir u w && mount -t overlay overlay -o lowerdir=/usr,upperdir=u,workdir=w /usr"
    return subprocess.run(["unshare", "-mn", "sh", "-c", trial], capture_output=True, check=False).returncode == 0


def closure(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """The distributions of the running environment that `requirements` need, by name."""
    found: dict[str, metadata.Distribution] = {}
    todo = [Requirement(line) for line in requirements]
    while todo:
        requirement = todo.pop()
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in (*requirement.extras, "")
        ):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        try:
            distribution = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{requirement.name} is not installed; requirements-dev.txt brings it")
        if name not in found:
            found[name] = distribution
            needed = [Requirement(line) for line in distribution.requires or ()]
            todo += [one for one in needed if "extra" not in str(one.marker or "")]
    return found


def write_wheel(folder: Path, distribution: metadata.Distribution, contents: dict[str, bytes | Path]) -> None:
    """A wheel of any platform with the distribution's own metadata, and these contents."""
    name = re.sub(r"[-_.]+", "_", distribution.name)
    notes = f"{name}-{distribution.version}.dist-info"
    contents = {
        **contents,
        f"{notes}/METADATA": distribution.read_text("METADATA").encode(),
        f"{notes}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*contents, f"{notes}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-{distribution.version}-py3-none-any.whl", "w") as wheel:
        for path, content in {**contents, f"{notes}/RECORD": record.encode()}.items():
            if isinstance(content, Path):
                wheel.write(content, path)
            else:
                wheel.writestr(path, content)


def linked(folder: Path, distribution: metadata.Distribution) -> dict[str, bytes | Path]:
    """The contents of a wheel that leads to the installed files of `distribution`, and to nothing else."""
    seen = folder / distribution.name
    seen.mkdir(parents=True)
    for file in distribution.files or ():
        top = file.parts[0]
        if top not in ("..", "__pycache__") and not top.endswith((".dist-info", ".pth")) and not (seen / top).exists():
            (seen / top).symlink_to(distribution.locate_file(top))
    return {f"seed-{distribution.name}.pth": f"{seen}\n".encode()}


def real(distribution: metadata.Distribution) -> dict[str, bytes | Path]:
    """The contents of a wheel with the installed files of `distribution`; scripts are left out."""
    return {
        file.as_posix(): Path(distribution.locate_file(file))
        for file in distribution.files or ()
        if not file.parts[0].endswith((".dist-info", "..")) and file.suffix != ".pyc"
    }


@pytest.fixture
def wheels(tmp_path) -> Path:
    """What quickstart installs, as wheels: OpenCV's two builds are real, the others lead to the running environment."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    lines = (ROOT / "requirements" / "core.txt").read_text(encoding="utf-8").splitlines()
    for name, distribution in closure([line for line in lines if not line.startswith("#")]).items():
        contents = real(distribution) if name == "opencv-python" else linked(tmp_path / "seed", distribution)
        write_wheel(folder, distribution, contents)
    write_wheel(folder, metadata.distribution("pip"), real(metadata.distribution("pip")))
    headless = f"opencv-python-headless=={metadata.version('opencv-python')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    if subprocess.run([*command, "--dest", str(folder), headless], capture_output=True, check=False).returncode:
        pytest.skip("opencv-python-headless cannot be had")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not can_unshare(), reason="needs root, unshare and layered file systems")
def test_the_first_command_on_a_bare_machine(tmp_path, wheels):
    """A fresh checkout, an empty home, no libGL, no ensurepip, no network.

    Real: the processes, .venv, pip and what it resolves and unpacks, both builds of OpenCV, the training and its image.
    Replaced: pip's index by a folder of wheels; all packages but OpenCV lead to those of the running environment, each
    to its own files only, so that what quickstart does not install is not there. The training has 10 steps, and each
    of its images 3.
    """
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    shutil.copytree(
        ROOT, checkout, ignore=shutil.ignore_patterns(".venv", ".git", "demo_out", "__pycache__", ".*_cache")
    )
    prompts = checkout / "examples" / "concept" / "prompts.txt"
    prompts.write_text(prompts.read_text(encoding="utf-8").replace("--s 30", "--s 3"), encoding="utf-8")
    home.mkdir()
    code = "import sys, ensurepip, pip; print(sys.base_prefix, ensurepip.__path__[0])"
    prefix, ensurepip = subprocess.check_output([sys._base_executable, "-c", code], text=True).split()
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(home),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_CONFIG_FILE": os.devnull,
        "OMP_NUM_THREADS": "1",
        "WORK": str(tmp_path / "layers"),
        "HIDDEN_FROM": "/usr" if prefix.startswith("/usr") else f"/usr {prefix}",
        "HIDDEN": ensurepip,
        "CHECKOUT": str(checkout),
        "PYTHON": sys._base_executable,
    }
    command = ["unshare", "--mount", "--net", "sh", "-c", BARE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told[-5000:]
    assert "OpenCV cannot be imported here (libGL.so.1" in done.stdout
    assert "putting opencv-python-headless" in done.stdout
    assert (checkout / "demo_out" / "before_after.png").is_file()
    assert (checkout / "demo_out" / "sks_flower.safetensors").is_file()
    assert "Traceback" not in told
