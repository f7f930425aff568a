"""Installs the xformers that was built for the torch of this environment, and leaves it out where there is none."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.runtime import logs

# The newest release that asks for exactly this torch.
BUILT_FOR = {
    "2.6.0": "0.0.29.post3",
    "2.7.0": "0.0.30",
    "2.7.1": "0.0.31.post1",
    "2.8.0": "0.0.32.post2",
    "2.9.0": "0.0.33.post1",
    "2.9.1": "0.0.33.post2",
}
# Uses torch's stable interface only: it works with every torch from this one on.
STABLE, STABLE_SINCE = "0.0.35", (2, 10)
CUDA = "12"  # what all of these are built with


def release_for(torch_version: str, cuda: str | None) -> tuple[str | None, str]:
    """The release of xformers for a build of torch, or None and the reason.

    Args:
        torch_version: as torch reports it, such as "2.9.1+cu128".
        cuda: the CUDA that torch was built with, such as "12.8"; None: without.
    """
    if cuda is None:
        return None, "this torch was built without CUDA"
    if cuda.partition(".")[0] != CUDA:
        return None, f"this torch was built with CUDA {cuda}, and the releases of xformers with CUDA {CUDA}"
    plain = torch_version.partition("+")[0]
    numbers = re.match(r"(\d+)\.(\d+)", plain)
    if numbers and tuple(map(int, numbers.groups())) >= STABLE_SINCE:
        return STABLE, ""
    return BUILT_FOR.get(plain), f"no release was built for torch {plain}"


def main() -> None:
    logs.quiet_third_parties()
    import torch

    from library.memory.attention import xformers_works

    release, reason = release_for(torch.__version__, torch.version.cuda)
    if release is None:
        print(f"xformers is left out: {reason}; torch's own attention is used (--sdpa)")
        return
    pip = [sys.executable, "-m", "pip"]
    print(f"installing xformers {release} for torch {torch.__version__}", flush=True)
    # Without its dependencies: pip must not exchange torch.
    install = [
        *pip,
        "install",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        f"xformers=={release}",
    ]
    if subprocess.run(install, check=False).returncode:
        print(
            f"xformers is left out: release {release} cannot be installed here; torch's own attention is used (--sdpa)"
        )
    elif torch.cuda.is_available() and not xformers_works():
        subprocess.run([*pip, "uninstall", "--yes", "--quiet", "xformers"], check=False)
        print(f"xformers is left out: kernels of release {release} do not work here; use --sdpa")


if __name__ == "__main__":
    main()
