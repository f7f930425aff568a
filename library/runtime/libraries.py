"""The libraries of every training run, imported without what it does not use: about half the CPU time of its start."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Set
from contextlib import contextmanager

# Optional packages that transformers and diffusers import wherever they are installed.
_OPTIONAL = frozenset({"bitsandbytes", "gguf", "modelopt", "optimum", "peft", "scipy", "torchao", "xformers"})


def import_libraries(used: Set[str]) -> None:
    """Imports torch, accelerate, and the bases of the model classes of transformers and diffusers.

    For a training script's own process only: transformers and diffusers conclude for good that optional packages are
    not installed, which a program that shares the process may not expect. Our own imports of these work as ever.
    All at once and first, as what another library has imported by then cannot be hidden.

    Args:
        used: the optional packages through which diffusers is to work.
    """
    with _no_collection(), _hidden(_OPTIONAL - used):
        import accelerate  # noqa: F401
        import diffusers.models.autoencoders
        import diffusers.models.transformers
        import diffusers.models.unets  # noqa: F401
        import transformers.modeling_utils
        import transformers.optimization  # noqa: F401


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: it would search the growing heap over and over, and modules are never garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


@contextmanager
def _hidden(packages: Set[str]) -> Iterator[None]:
    """Packages that are not imported yet cannot be found: None in `sys.modules`, as the import system defines it."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
