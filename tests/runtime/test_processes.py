"""Processes that share work and tensors, in real processes over gloo."""

from __future__ import annotations

from library.runtime.processes import Processes

WORKER = """
import sys
from pathlib import Path

import torch
from library.runtime.processes import Processes

torch.distributed.init_process_group("gloo")
ours = Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
assert list(ours.shard("abcde")) == (["a", "c", "e"], ["b", "d"])[ours.rank]
assert ours.all_max(ours.rank * 7) == 7
assert ours.all_gather({"a": ours.rank}) == [{"a": 0}, {"a": 1}]
ours.barrier()
own = [torch.full((2, n + 1), float(10 * ours.rank + n)) for n in range(2 - ours.rank)]
shapes = [[(2, 1), (2, 2)], [(2, 1)]]
seen = [[tensor[0, 0].item() for tensor in theirs] for theirs in ours.broadcast_all(own, shapes)]
assert seen == [[0.0, 1.0], [10.0]], seen
ours.close()
assert not torch.distributed.is_initialized()
Path(sys.argv[1], f"fine {ours.rank}").touch()
"""


def test_one_process_waits_for_nobody():
    alone = Processes()
    alone.barrier()
    assert alone.all_max(3) == 3
    assert alone.all_gather("x") == ["x"]
    assert list(alone.shard([1, 2])) == [1, 2]


def test_two_processes(run_script, tmp_path):
    done = run_script("-c", WORKER, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.glob("fine *")) == ["fine 0", "fine 1"]
