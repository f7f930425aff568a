"""Checkpointed activations in CPU memory: the same numbers, and only what is large goes there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.memory import offload
from library.memory.offload import offloading_checkpoint
from tests.builders import tiny_sd

CPU = torch.device("cpu")


def gradients(unet) -> tuple[torch.Tensor, list[torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    device = unet.device
    noisy = torch.randn(2, 4, 16, 16, generator=rng).to(device).requires_grad_()
    text = torch.randn(2, 77, 64, generator=rng).to(device)
    unet.zero_grad()
    unet(noisy, torch.tensor([10, 900], device=device), text).sample.square().mean().backward()
    return noisy.grad, [parameter.grad for parameter in unet.parameters()]


@pytest.mark.rows("R364")
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_results_are_those_of_plain_checkpointing(trained, monkeypatch):
    unet = tiny_sd().denoiser.requires_grad_(trained).train()
    unet.enable_gradient_checkpointing()
    expected = gradients(unet)
    made = []
    real = offload._OffloadedTensor
    monkeypatch.setattr(offload, "_OffloadedTensor", type("Counted", (real,), {"__init__": _noting(real, made)}))
    unet.enable_gradient_checkpointing(offloading_checkpoint(CPU, smallest=0))
    got = gradients(unet)
    assert torch.equal(got[0], expected[0])
    assert all(a is b or torch.equal(a, b) for a, b in zip(got[1], expected[1], strict=True))
    assert len(made) > 20, "nothing was moved"


def _noting(real, made):
    def init(self, tensor, *rest):
        made.append(tensor.shape)
        real.__init__(self, tensor, *rest)

    return init


def test_small_inputs_and_weights_stay():
    kept = []

    class Block(nn.Module):
        def forward(self, x, small, weight):
            kept.append((x.data_ptr(), small.data_ptr(), weight.data_ptr()))
            return x * small.sum() * weight.sum()

    x = torch.randn(1000, requires_grad=True) * 1
    small = torch.randn(10)
    weight = nn.Parameter(torch.randn(1000))
    offloading_checkpoint(CPU, smallest=4000)(Block(), x, small, weight).sum().backward()
    forward, again = kept
    assert forward[0] != again[0], "the large input comes back from another place"
    assert forward[1:] == again[1:]


def test_nothing_is_kept_without_gradients(monkeypatch):
    monkeypatch.setattr(offload, "_OffloadedTensor", None)  # calling it would fail
    with torch.no_grad():
        out = offloading_checkpoint(CPU, smallest=0)(nn.Linear(4, 4), torch.randn(2, 4))
    assert out.shape == (2, 4)


@pytest.mark.rows("R364")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_memory_falls_and_numbers_stay():
    device = torch.device("cuda")
    block = nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024)).to(device).requires_grad_(False)
    x = torch.randn(16384, 1024, device=device, requires_grad=True)  # 64 MiB

    def run(checkpointed):
        torch.cuda.reset_peak_memory_stats()
        x.grad, out = None, x * 1
        for _ in range(16):
            out = checkpointed(block, out)
        out.square().mean().backward()
        return x.grad.clone(), torch.cuda.max_memory_allocated()

    plain, much = run(lambda module, given: torch.utils.checkpoint.checkpoint(module, given, use_reentrant=False))
    got, little = run(offloading_checkpoint(device))
    assert torch.equal(got, plain)
    assert little < much - 8 * x.nbytes
