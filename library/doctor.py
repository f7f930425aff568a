"""Looks at the machine and the environment for what keeps trainings from working, and says how to repair it.

`python quickstart.py --doctor` runs it. It works where packages are missing: each check imports what it needs itself.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from library.runtime.packages import pip

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = {  # file in requirements/ -> what goes without it
    "core": None,
    "optimizers": "8-bit and further optimizers, --quantize_base int8 and nf4",
    "tagging": "tag_images_by_wd14_tagger.py and detect_face_rotate.py",
    "wandb": "--log_with wandb",
}
TORCH = "https://pytorch.org/get-started/locally/; torch stays below 2.14"
GIB = 1 << 30
DISK = 10 * GIB  # a checkpoint and its state, or the caches of some thousand images
SHARED_MEMORY = GIB  # worker processes hand batches over through it
OPEN_FILES = 1024  # what most systems allow; fewer do not suffice for worker processes and shards


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    state: Literal["ok", "note", "fault"]  # a note: something optional is missing
    text: str
    remedy: str = ""  # a command or an advice


def system() -> Iterator[Finding]:
    yield Finding("ok", f"Python {platform.python_version()} ({sys.executable}) on {platform.platform()}")


def packages() -> Iterator[Finding]:
    """Versions of the installed packages against the ranges in requirements/."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Finding("fault", "packages of requirements/core.txt are missing", _install("core"))
        return
    for name, without in REQUIREMENTS.items():
        lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
        faults = [fault for one in wanted if (fault := _package_fault(one))]
        if not faults:
            yield Finding("ok", f"requirements/{name}.txt: all {len(wanted)} packages are there")
        elif without is None:
            yield Finding("fault", f"requirements/{name}.txt: {', '.join(faults)}", _install(name))
        else:
            yield Finding("note", f"requirements/{name}.txt: {', '.join(faults)}; needed for {without}", _install(name))


def _package_fault(requirement: object) -> str | None:
    """What is wrong with a package, as text; None: nothing, or this platform needs none."""
    if requirement.marker is not None and not requirement.marker.evaluate():
        return None
    found = _version(requirement.name)
    if found is None and requirement.name == "opencv-python":  # quickstart.py puts it in the place of the other
        found = _version("opencv-python-headless")
    if found is None:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name} {found} is not {requirement.specifier}"
    return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _install(name: str) -> str:
    return pip("install", "-r", ROOT / "requirements" / f"{name}.txt")


def imports() -> Iterator[Finding]:
    """Packages with compiled parts, which may be there and fail to load."""
    for module in ("cv2", "tokenizers", "onnxruntime"):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            continue  # named among the packages
        except ImportError as error:
            remedy = "python quickstart.py (it exchanges opencv-python)" if module == "cv2" else "install it again"
            yield Finding("fault", f"{module} cannot be loaded: {error}", remedy)


def gpus() -> Iterator[Finding]:
    """The build of torch and the GPUs that it sees."""
    try:
        import torch
    except ImportError as error:
        yield Finding("fault", f"torch cannot be loaded: {error}", _install("core"))
        return
    cuda, rocm = torch.version.cuda, torch.version.hip
    built = f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "without CUDA"
    seen = torch.cuda.is_available()
    if not seen and shutil.which("nvidia-smi"):
        wrong = "its driver does not fit" if cuda else "this torch cannot use it"
        remedy = "install a newer NVIDIA driver" if cuda else f"take the command for your system from {TORCH}"
        yield Finding("fault", f"torch {torch.__version__}, {built}: there is an NVIDIA GPU, but {wrong}", remedy)
        return
    yield Finding("ok", f"torch {torch.__version__}, {built}")
    if not seen:
        yield Finding("note", "no GPU: trainings run on the CPU, which is slow for all but small models")
    for index in range(torch.cuda.device_count() if seen else 0):
        facts = torch.cuda.get_device_properties(index)
        free = torch.cuda.mem_get_info(index)[0] / GIB
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16: --mixed_precision fp16"
        memory = f"{facts.total_memory / GIB:.1f} GiB, {free:.1f} free"
        yield Finding(
            "ok", f"GPU {index}: {facts.name}, {memory}, compute capability {facts.major}.{facts.minor}, {bf16}"
        )
        yield from kernels(index)


def kernels(index: int) -> Iterator[Finding]:
    """Whether bitsandbytes and xformers, where they are installed, work on a GPU."""
    import torch

    device = torch.device("cuda", index)
    if _version("bitsandbytes"):
        try:
            from bitsandbytes.functional import quantize_4bit

            quantize_4bit(torch.ones(64, 64, device=device, dtype=torch.bfloat16))
        except Exception as error:  # it raises whatever its loader meets
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            yield Finding(
                "fault", f"bitsandbytes has no kernels for this GPU: {reason}", pip("install", "-U", "bitsandbytes")
            )
        else:
            yield Finding("ok", "bitsandbytes: kernels work")
    if _version("xformers"):
        from library.memory.attention import xformers_works

        if xformers_works():
            yield Finding("ok", "xformers: kernels work")
        else:
            yield Finding("note", "xformers has no kernels for this GPU and torch", "python tools/install_xformers.py")


def compilers() -> Iterator[Finding]:
    """--torch_compile's inductor needs a C++ compiler on the CPU."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        yield Finding(
            "note", "no C++ compiler: --torch_compile cannot work", "on Debian and Ubuntu: sudo apt install g++"
        )


def disk() -> Iterator[Finding]:
    """Free space where results, temporary files and models of the hub go."""
    places = {"the current folder": Path.cwd(), "the hub's cache": hub_cache()}
    for name, place in places.items():
        existing = next(folder for folder in (place, *place.parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        state = "ok" if free >= DISK else "fault"
        remedy = (
            "" if state == "ok" else "make room, or set HF_HOME to another disk" if place != Path.cwd() else "make room"
        )
        yield Finding(state, f"{free / GIB:.0f} GiB free for {name} ({place})", remedy)


def hub_cache() -> Path:
    """The folder in which huggingface_hub keeps models."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def hub() -> Iterator[Finding]:
    """Whether models of the hub can be kept."""
    place = hub_cache()
    try:
        place.mkdir(parents=True, exist_ok=True)
        trial = place / f".trial-{os.getpid()}"
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        yield Finding(
            "fault",
            f"{place}: models of the hub cannot be kept there ({error.strerror})",
            "set HF_HOME to a folder of yours",
        )


def limits() -> Iterator[Finding]:
    """Limits of the system that end worker processes in the middle of a run."""
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        if size < SHARED_MEMORY:
            remedy = "docker run --shm-size=8g, or --max_data_loader_n_workers=0"
            yield Finding("fault", f"/dev/shm has {size >> 20} MiB, too few for worker processes", remedy)
        else:
            yield Finding("ok", f"/dev/shm: {size / GIB:.1f} GiB")
    if os.name != "nt":
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
            yield Finding("fault", f"only {soft} files may be open at once", "ulimit -n 65536")
        else:
            yield Finding(
                "ok", f"{'any number of' if soft == resource.RLIM_INFINITY else soft} files may be open at once"
            )


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    system, packages, imports, gpus, compilers, disk, hub, limits,
)  # fmt: skip


def main() -> int:
    """Prints what is found; returns 1 if anything is at fault, else 0."""
    findings = [finding for check in CHECKS for finding in check()]
    for finding in findings:
        print(f"{finding.state:5}  {finding.text}")
        if finding.remedy:
            print(f"       -> {finding.remedy}")
    faults = sum(finding.state == "fault" for finding in findings)
    print(f"{faults} fault{'' if faults == 1 else 's'} found" if faults else "nothing is at fault")
    return 1 if faults else 0


if __name__ == "__main__":
    from library.runtime.logs import quiet_third_parties

    quiet_third_parties()
    raise SystemExit(main())
