"""Which attention kernel the denoiser uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from torch import nn

    from library.options.memory import MemoryOptions


def xformers_works() -> bool:
    """Whether xformers has kernels for this machine; its import succeeds without any."""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        from xformers.ops import memory_efficient_attention

        probe = torch.zeros(1, 8, 1, 16, device="cuda", dtype=torch.float16)
        memory_efficient_attention(probe, probe, probe)
    except (ImportError, NotImplementedError, RuntimeError):
        return False
    return True


def set_attention(denoiser: nn.Module, options: MemoryOptions) -> str:
    """Applies --xformers, --mem_eff_attn or --sdpa and returns the name of what is used.

    torch's scaled_dot_product_attention is what diffusers uses by itself; it needs no switching on.
    """
    import torch

    used = options.attention[:1]
    if used == ("mem_eff_attn",):
        # Never the kernel that writes out the whole attention matrix.
        torch.backends.cuda.enable_math_sdp(False)
        return "memory-efficient sdpa"
    if used == ("xformers",):
        if xformers_works():
            denoiser.enable_xformers_memory_efficient_attention()
            return "xformers"
        LOGGER.warning("--xformers: no xformers kernels work on this machine; torch's sdpa is used instead")
        LOGGER.info("python tools/install_xformers.py installs the xformers for this torch, if there is one")
    return "sdpa"
