"""Sharded weights, in two processes on the CPU: gathering, sharding, and what optimizers make of them."""

from __future__ import annotations

import pytest

BEGIN = """
import torch
import torch.distributed as dist
from torch import nn
from library.errors import UserError
from library.options.sharding import Sharding
from library.training import sharding

dist.init_process_group("gloo")
first = dist.get_rank() == 0
shards = sharding.Shards(Sharding("FSDP", {reshard}, False), torch.device("cpu"), 2, first=first)
"""
# Groups that a mesh still refers to when the interpreter ends are not joined, and one of their threads can abort it.
END = """
import gc
dist.barrier()
dist.destroy_process_group()
if first:
    print("reached the end")
for name in [name for name in globals() if not name.startswith("__") and name != "gc"]:
    del globals()[name]
gc.collect()
"""
TREE = """
torch.manual_seed(0)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.out.weight

    def forward(self, x):
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.tied(self.norm(self.out(x)))

model = Model()
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
shards.shard(model, None, torch.float32, None)
assert all(isinstance(p, sharding.DTensor) for p in model.parameters())
"""
ROUND_TRIPS = """
x = torch.randn(4, 6)
for round in range(2):  # before and after weights were gathered for a forward pass, which may leave them whole
    with shards.unshard():
        found = model.state_dict()
        if first:
            assert found.keys() == before.keys()
            assert all(torch.equal(found[name], before[name]) for name in before if "running" not in name)
            assert not any(isinstance(tensor, sharding.DTensor) for tensor in found.values())
    shards.refresh()
    assert all(isinstance(p, sharding.DTensor) for p in model.parameters())
    with torch.no_grad():
        model.eval()(x)

gathered = sharding.full_tensors({"a": [model.state_dict()["out.weight"]], "b": 3}, keep=first)
assert gathered["b"] == 3
assert torch.equal(gathered["a"][0], before["out.weight"]) if first else gathered["a"] == [None]

with torch.no_grad():
    for p in model.parameters():
        p.zero_()
model.load_state_dict(sharding.shard_like(before, model.state_dict()))
assert torch.equal(sharding.full_tensors(model.state_dict()["out.weight"]), before["out.weight"])

adam = torch.optim.AdamW(model.parameters())
model.train()(x).sum().backward()
adam.step()
state = sharding.full_tensors(adam.state_dict())
fresh = torch.optim.AdamW(model.parameters())
fresh.load_state_dict(sharding.shard_optimizer_state(state, fresh))
for one, two in zip(adam.state.values(), fresh.state.values()):
    assert {key: type(value) for key, value in one.items()} == {key: type(value) for key, value in two.items()}
    assert all(torch.equal(sharding.full_tensors(one[key]), sharding.full_tensors(two[key])) for key in one)
"""
OPTIMIZERS = """
def refused(make, name):
    try:
        sharding.check_optimizer(make, name, shards.mesh)
    except UserError as error:
        return str(error)

assert refused(lambda weights: torch.optim.AdamW(weights, fused=True), "AdamW") is None
assert refused(lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9), "SGD") is None

class ByNorm(torch.optim.SGD):
    "Its step depends on the norm of what a process has."
    def step(self):
        for weight in self.param_groups[0]["params"]:
            local = weight.grad.to_local() if isinstance(weight.grad, sharding.DTensor) else weight.grad
            weight.data.sub_(weight.grad / local.norm())

said = refused(lambda weights: ByNorm(weights, lr=0.1), "ByNorm")
assert "ByNorm cannot step sharded weights (its result is off by" in said, said
said = refused(lambda weights: torch.optim.Adafactor(weights), "Adafactor")
assert "Adafactor cannot step sharded weights" in said, said
"""


@pytest.fixture
def in_two_processes(run_script):
    def run(*parts: str) -> None:
        done = run_script("-c", "\n".join((*parts, END)), processes=2)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "reached the end" in done.stdout

    return run


@pytest.mark.parametrize("reshard", [True, False])
def test_what_is_sharded_is_gathered_and_put_back(in_two_processes, reshard):
    in_two_processes(BEGIN.format(reshard=reshard), TREE, ROUND_TRIPS)


def test_optimizers_that_step_sharded_weights_otherwise_are_found(in_two_processes):
    in_two_processes(BEGIN.format(reshard=True), OPTIMIZERS)
