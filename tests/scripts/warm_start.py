"""Imports what every training script needs, once, and forks a process for each run: imports are most of a short run.

Each line of standard input asks for runs of one command, in JSON:

    {"argv": ["train_network.py", ...], "folder": path, "output": file, "errors": file, "environments": [{...}, ...]}

The first word is a file, or `-c` where the second one is code, as on Python's own command line.

One process is started for each environment. The first answer is a line with the number of the first process. When all
have ended, another one has the exit status of the first that failed, or 0. Our own modules are imported beforehand,
too, a quarter of a short run; what a script imports by itself is seen in tests that start it the usual way.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
import threading

sys.path[0] = os.getcwd()


def main() -> None:
    import_libraries()
    import_ours()
    gc.freeze()  # what is here stays, and need not be copied because a run looked at it
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for environment in request["environments"]:
            child = os.fork()
            if not child:
                become(request, environment)
                end(status_of(request["argv"]))
            children.append(child)
        print(children[0], flush=True)
        print(wait_for_all(children), flush=True)


def import_libraries() -> None:
    from library.runtime import libraries, logs

    logs.quiet_third_parties()
    libraries.import_libraries(set())
    import cv2  # noqa: F401
    import safetensors.torch  # noqa: F401
    import scipy.sparse.csgraph  # noqa: F401
    import toml  # noqa: F401
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
    from PIL import Image
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel  # noqa: F401

    Image.init()


def import_ours() -> None:
    import library
    import networks

    for package in (library, networks):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def become(request: dict, environment: dict[str, str]) -> None:
    """Makes this process look like one that was started with a command line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which it ignores where the suite runs in the background
    for number, flags, name in (
        (0, os.O_RDONLY, os.devnull),
        (1, os.O_WRONLY | os.O_APPEND | os.O_CREAT, request["output"]),
        (2, os.O_WRONLY | os.O_APPEND | os.O_CREAT, request["errors"]),
    ):
        opened = os.open(name, flags)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(environment)


def status_of(line: list[str]) -> int:
    """Runs a command line as Python does; returns the exit status."""
    first, *more = line
    try:
        if first == "-c":
            sys.argv, sys.path[0] = ["-c", *more[1:]], ""
            exec(compile(more[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        else:
            sys.argv, sys.path[0] = line, os.path.dirname(os.path.abspath(first))
            runpy.run_path(first, run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def end(status: int) -> None:
    """Ends this process as Python does, but for the release of all that was imported: a third of a second for each."""
    threading._shutdown()  # waits for threads, and calls what waits for their end
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status & 0xFF)


def wait_for_all(children: list[int]) -> int:
    """As torch's launcher does: where one process fails, the others end too."""
    first, left = 0, set(children)
    while left:
        child, status = os.wait()
        left.discard(child)
        code = os.waitstatus_to_exitcode(status)
        if code and not first:
            first = code
            for other in left:
                os.kill(other, signal.SIGTERM)
    return first


if __name__ == "__main__":
    main()
