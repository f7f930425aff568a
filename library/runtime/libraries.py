"""The libraries of every training run, imported without what it does not use: about half the CPU time of its start."""

from __future__ import annotations

import gc
import sys
from collections.abc import Set

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
    hidden = [name for name in _OPTIONAL - used if name not in sys.modules]
    collected = gc.isenabled()
    gc.disable()  # it would search the growing heap over and over, and modules are never garbage
    sys.modules.update(dict.fromkeys(hidden))  # with None there they cannot be found, as the import system defines it
    try:
        import accelerate  # noqa: F401
        import diffusers.models.autoencoders
        import diffusers.models.transformers
        import diffusers.models.unets  # noqa: F401
        import transformers.modeling_utils
        import transformers.optimization  # noqa: F401
    finally:
        for name in hidden:
            del sys.modules[name]
        gc.freeze()
        if collected:
            gc.enable()
