"""Two processes end up with the gradient that one process with twice the batch has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
TWO_PROCESSES = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from library.training.loop import average_gradients

def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    used, idle = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    data = torch.arange(12.0).reshape(4, 3)
    used(data[2 * rank : 2 * rank + 2]).square().mean().backward()
    if rank == 1:  # a layer that only one process reached, as with layer dropout
        idle(data[:1]).sum().backward()
    parameters = [*used.parameters(), *idle.parameters()]
    average_gradients(parameters, 2)
    torch.save([p.grad for p in parameters], f"{folder}/{rank}.pt")

if __name__ == "__main__":
    mp.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
"""


def test_the_mean_over_two_processes(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    command = [sys.executable, str(script), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.manual_seed(0)
    used, idle = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    data = torch.arange(12.0).reshape(4, 3)
    used(data).square().mean().backward()
    idle(data[:1]).sum().backward()
    expected = [*(p.grad for p in used.parameters()), *(p.grad / 2 for p in idle.parameters())]
    for mine, other, wanted in zip(first, second, expected, strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6)  # float32, summed in another order
