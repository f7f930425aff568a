"""Two processes end up with the gradient that one process with twice the batch has, and with none where it has none."""

from __future__ import annotations

import torch

TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from library.runtime.processes import Processes
from library.training.loop import average_gradients

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
used, idle, unused = (torch.nn.Linear(3, 2) for _ in range(3))
data = torch.arange(12.0).reshape(4, 3)
used(data[2 * rank : 2 * rank + 2]).square().mean().backward()
if rank == 1:  # a layer that only one process reached, as with layer dropout
    idle(data[:1]).sum().backward()
parameters = [*used.parameters(), *unused.parameters(), *idle.parameters()]
average_gradients(parameters, Processes(rank, 2))
torch.save([p.grad for p in parameters], f"{sys.argv[1]}/{rank}.pt")
dist.destroy_process_group()
"""


def test_the_mean_over_two_processes(run_script, tmp_path):
    result = run_script("-c", TWO_PROCESSES, tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.manual_seed(0)
    used, idle = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    data = torch.arange(12.0).reshape(4, 3)
    used(data).square().mean().backward()
    idle(data[:1]).sum().backward()
    none = [None, None]  # zeros would be a reason for AdamW to move the weights
    expected = [*(p.grad for p in used.parameters()), *none, *(p.grad / 2 for p in idle.parameters())]
    for mine, other, wanted in zip(first, second, expected, strict=True):
        if wanted is None:
            assert mine is other is None
            continue
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6)  # float32, summed in another order
