"""The device that stands for a GPU computes as CUDA does, as far as shapes, dtypes and kernels go."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from library.planning import gpu
from library.planning.played import PlayedWatcher, played_machine


def listed(macro: str) -> set[str]:
    """The operations of one of torch's own lists for autocast, in its header."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    text = header.read_text(encoding="utf-8")
    body = text.partition(f"#define {macro}(_)")[2].partition("\n\n")[0].partition("#define")[0]
    found = re.findall(r"_\((\w+)(?:, (\w+))?\)", body)
    return {name if not overload else f"{name}.{overload}" for name, overload in found}


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the lists are those of torch 2.13")
@pytest.mark.parametrize(
    ("macro", "ours"),
    [
        ("AT_FORALL_LOWER_PRECISION_FP", gpu.LOWER_PRECISION),
        ("AT_FORALL_FP32", gpu.FLOAT32),
        ("AT_FORALL_FP32_SET_OPT_DTYPE", gpu.FLOAT32_RESULT),
        ("AT_FORALL_PROMOTE", gpu.WIDEST),
    ],
)
def test_autocast_has_the_operations_of_torch(macro, ours):
    assert set(ours.split()) == listed(macro)


class Doubled(torch.autograd.Function):
    """Fails in its backward pass where `failing` does."""

    failing = None

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return Doubled.failing(x) if Doubled.failing else gradient * 2


def fails(*_):
    raise ValueError("of a hook")


@pytest.mark.parametrize("place", ["hook of a tensor", "hook of a saved tensor", "operation", "function"])
def test_an_exception_in_a_backward_pass_is_raised_by_it(place, monkeypatch):
    """Torch's own place for such a device ends the process."""
    device = gpu.register_gpu()
    with played_machine(PlayedWatcher(), gpu=True):
        x = torch.ones(3, device=device, requires_grad=True)
        with nullcontext() if place != "hook of a saved tensor" else saved_tensors_hooks(lambda y: y, fails):
            y = Doubled.apply(x * x)
        if place == "hook of a tensor":
            y.register_hook(fails)
        if place == "function":
            monkeypatch.setattr(Doubled, "failing", fails)
        if place == "operation":
            y.register_hook(lambda _: monkeypatch.setattr(PlayedWatcher, "run", fails))
        with pytest.raises(ValueError, match="of a hook"), gpu.true_errors():
            y.sum().backward()
        monkeypatch.undo()
        (x * x).sum().backward()  # the next one is as if nothing had happened
        assert x.grad.device == device
