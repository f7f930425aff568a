"""Memory-efficient attention: what the U-Net allocates while it trains."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from library.memory.attention import set_attention
from library.options.memory import MemoryOptions
from tests.builders import tiny_sd

SIDE = 24  # of the latents; the first level's self-attention is over SIDE² positions, with 8 heads
WHOLE_MATRIX = 2 * 8 * (SIDE * SIDE) ** 2  # numbers, for the batch of 2


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor holds that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.fixture
def switches():
    """The kernels that torch may choose from are a setting of the process."""
    before = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.backends.cuda.enable_math_sdp(before[0])
    torch.backends.cuda.enable_flash_sdp(before[1])


def trained_once(unet) -> tuple[int, torch.Tensor]:
    """(largest tensor of a forward and backward pass, gradient of the input)."""
    noisy = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    text = torch.randn(2, 77, 64, generator=torch.Generator().manual_seed(1))
    with Largest() as largest:
        unet(noisy, torch.tensor([10, 900]), text).sample.square().mean().backward()
    return largest.numbers, noisy.grad


@pytest.mark.rows("R173")
def test_the_attention_matrix_is_never_written_out(switches):
    unet = tiny_sd().denoiser
    with sdpa_kernel(SDPBackend.MATH):
        plain, expected = trained_once(unet)
    assert plain >= WHOLE_MATRIX
    options = MemoryOptions(mem_eff_attn=True)
    assert set_attention(unet, options) == "memory-efficient sdpa"
    efficient, gradient = trained_once(unet)
    assert efficient < WHOLE_MATRIX / 8
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-7)  # float32 sums in another order

    # Where no kernel without that matrix works, the run says so instead of taking the memory.
    torch.backends.cuda.enable_flash_sdp(False)
    with pytest.raises(RuntimeError, match=r"No available kernel|No viable backend"):
        trained_once(unet)
