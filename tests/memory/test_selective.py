"""Selective checkpointing: the same numbers, less memory than without checkpointing, fewer operations than with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from library.memory.selective import selective_checkpoint

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
CPU = torch.device("cpu")
RATIOS = (0, 1, 3, 1000)


class Counted(TorchDispatchMode):
    """The operations that run within it, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    """With a change in place of a product, one of an input's copy, dropout, and an attention."""

    def __init__(self, width=16):
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        query = self.query(x)
        query.mul_(2)
        value = self.value(x.clone().add_(1)).tanh()
        seen = nn.functional.scaled_dot_product_attention(query[:, None], query[:, None].sin(), value[:, None])
        return x + self.drop(self.out(seen[:, 0]).sigmoid()) * value.exp()


def passed(blocks, checkpoint=None):
    torch.manual_seed(3)
    x = torch.randn(2, 5, 16, requires_grad=True)
    out = x
    for block in blocks:
        block.zero_grad()
        out = block(out) if checkpoint is None else checkpoint(block, out)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(weight.grad for block in blocks for weight in block.parameters())]


@pytest.mark.parametrize("ratio", RATIOS)
def test_results_are_the_same_to_the_bit(ratio):
    torch.manual_seed(0)
    blocks = [Block() for _ in range(3)]
    expected = passed(blocks)
    assert all(map(torch.equal, passed(blocks, selective_checkpoint(ratio)), expected))


def test_what_is_trained_may_change_between_steps():
    """Blocks then need other results than those that were expected of them."""
    torch.manual_seed(0)
    block = Block()
    for ratio in (0, 1, 2, 4, 8):
        checkpoint = selective_checkpoint(ratio)
        for trained in (True, False, True, False, True):
            block.requires_grad_(trained)
            expected = passed([block])
            for got, one in zip(passed([block], checkpoint), expected, strict=True):
                assert got is one is None or torch.equal(got, one)


def test_more_room_means_fewer_operations_and_the_code_of_a_block_runs_once():
    ran = []

    class Watched(Block):
        def forward(self, x):
            ran.append(len(x))
            return super().forward(x)

    totals = []
    for ratio in (None, 1000, 3, 0):
        ran.clear()
        with Counted() as counted:
            passed([Watched()], None if ratio is None else selective_checkpoint(ratio))
        assert len(ran) == 1
        totals.append(sum(counted.calls[f"aten::{name}"] for name in ("addmm", "mm", "tanh", "sin", "exp", "sigmoid")))
    assert totals[0] == totals[1] < totals[2] <= totals[3]


def test_an_attention_is_kept_before_what_is_cheap():
    class Wide(nn.Module):
        def forward(self, x):
            seen = nn.functional.scaled_dot_product_attention(x.sin(), x.cos(), x.tanh())
            return x * seen.sin().exp()

    x = torch.randn(1, 2, 256, 8, requires_grad=True)
    with Counted() as counted:
        selective_checkpoint(1.2)(Wide(), x).sum().backward()
    names = [name for name in counted.calls if "attention" in name and "backward" not in name]
    assert [counted.calls[name] for name in names] == [1]
    assert counted.calls["aten::tanh"] + counted.calls["aten::cos"] + counted.calls["aten::exp"] > 3


def test_what_is_not_kept_is_not_held():
    """With no room nothing of a block's inside is alive between the passes."""
    alive = []

    class Deep(nn.Module):
        def forward(self, x):
            for _ in range(20):
                x = x.sin()
                alive.append(torch.multiprocessing.reductions.StorageWeakRef(x.untyped_storage()))
            return x

    out = selective_checkpoint(0)(Deep(), torch.randn(1000, requires_grad=True))
    assert [one.expired() for one in alive] == [True] * 19 + [False]
    out.sum().backward()


def test_nothing_is_recorded_without_gradients():
    with torch.no_grad(), Counted() as counted:
        out = selective_checkpoint(0)(nn.Linear(4, 4), torch.randn(2, 4))
    assert out.shape == (2, 4)
    assert counted.calls["aten::addmm"] == 1


def test_a_block_input_that_changes_before_the_backward_pass_is_noticed():
    x = torch.randn(4, 4, requires_grad=True)
    given = x * 1
    out = selective_checkpoint(0)(nn.Sequential(nn.Tanh(), nn.Linear(4, 4), nn.Tanh()), given)
    given.detach().add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


@pytest.fixture
def bench_models(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_models

    return bench_models


LORA = "--gradient_checkpointing", "--selective_checkpointing=3"
CASES = [
    ("sd15-lora", ()),
    ("sdxl-lora", ()),
    ("sd35-lora", ()),
    ("flux-lora", ()),
    ("flux-fp8", ()),
    ("flux-lora", ("--quantize_base=int8",)),
    ("flux-lora", ("--quantize_base=nf4",)),
    ("sdxl-full", ()),
]


def weights_after(bench_models, row, arguments):
    torch.manual_seed(0)
    made = bench_models.assemble(row, arguments, 1, CPU, tiny=True)
    losses = [made.step() for _ in range(3)]
    return losses, {name: weight.detach().clone() for name, weight in made.method.trainable().named_parameters()}


@pytest.mark.parametrize(("name", "more"), CASES, ids=lambda one: one if isinstance(one, str) else "".join(one)[11:])
def test_training_is_that_without_checkpointing(bench_models, name, more):
    """Three steps in bf16, with the network's changes in place, its shared products and quantised weights."""
    row = replace(bench_models.ROWS[name], arguments=(*bench_models.ROWS[name].arguments, *more))
    losses, weights = weights_after(bench_models, row, ())
    got_losses, got = weights_after(bench_models, row, LORA)
    assert all(map(torch.equal, got_losses, losses))
    assert weights.keys() == got.keys()
    assert all(torch.equal(got[name], weights[name]) for name in weights)
    assert losses[0] != losses[2]
